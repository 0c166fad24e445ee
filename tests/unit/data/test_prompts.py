"""Data: what is said about bad files and rows, what the model and the rewards get, and the counting sampler."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_dist.config.schema import DataConfig, RewardConfig
from grpo_dist.data.order import Sampler, permutation
from grpo_dist.data.prompts import PromptReader, load_rows, render
from grpo_dist.data.rows import open_rows
from grpo_dist.rewards.registry import answer_checks

TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MATH = answer_checks([RewardConfig("math")])


def make_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, and a BOS before everything that is tokenised with special tokens."""
    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEMPLATE)


def write(directory: Path, *lines: object, name: str = "train.jsonl") -> str:
    path = directory / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def row(n: int, **columns: object) -> dict[str, Any]:
    return {"prompt": f"What is {n}?", "answer": str(n), **columns}


def test_the_recipe_s_rows_arrive(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, row(1), "", row(22, level="hard"))
    prompts, report = PromptReader(DataConfig(), tokenizer, MATH).load(path, "train")
    assert [prompt.index for prompt in prompts] == [0, 1]
    assert [prompt.text for prompt in prompts] == ["What is 1?", "What is 22?"]
    assert [prompt.columns for prompt in prompts] == [{"answer": "1", "level": None}, {"answer": "22", "level": "hard"}]
    assert prompts[1].ids == tokenizer("What is 22?").input_ids
    assert prompts[1].ids[0] == tokenizer.bos_token_id and prompts[1].messages is None
    assert (report.num_rows, report.dropped) == (2, [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"', "line 2: not JSON: Expecting"),
        ("[1, 2]", "line 2: a JSON list, expected an object"),
        ("[" * 100_000, "line 2: not JSON"),
        (r'{"prompt": "a", "answer": "\ud800"}', r"line 2: half a character \('\\ud800': a lone surrogate\)"),
        (r'{"prompt": [{"role": "user", "content": "a \udc00"}], "answer": "1"}', "line 2: half a character"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "line 2: not JSON: Exceeds the limit"),
        ('{"prompt": "a", "answer": "1", "answer": "2"}', "line 2: not JSON: the name 'answer' occurs twice"),
        ('{"prompt": "a", "answer": "1", "x": [{"y": 1, "y": 1}]}', "line 2: not JSON: the name 'y' occurs twice"),
        ({"answer": "1"}, "line 2: no 'prompt'"),
        ({"prompt": "a"}, "line 2: no 'answer'"),
        ({"prompt": "a", "answer": None}, "line 2: no 'answer'"),
        ({"prompt": "a", "answer": float("nan")}, "line 2: no 'answer'"),
        ({"prompt": "a", "answer": "unknown"}, "line 2: the answer 'unknown' has no integer"),
        ({"prompt": "  ", "answer": "1"}, "line 2: the prompt is empty"),
        ({"prompt": 3, "answer": "1"}, "line 2: the prompt is a int, expected text or a list of messages"),
        ({"prompt": [], "answer": "1"}, "line 2: the prompt has no message at its end"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}, "beginning of the answer is given"),
        ({"prompt": ["a"], "answer": "1"}, "line 2: 'a' in the prompt is not a message"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, r"line 2: \{'role': 'user'\} in the prompt is not a message"),
        (
            {"prompt": [{"role": "human", "content": "a"}], "answer": "1"},
            "a message of the role 'human', expected 'user'",
        ),
        (
            {"prompt": [{"role": "User", "content": "a"}], "answer": "1"},
            "a message of the role 'User', expected 'user'",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "gpt", "content": "1"}], "answer": "1"},
            "a message of the role 'gpt', expected 'assistant'",
        ),
        ({"prompt": [{"role": "tool", "content": "a"}], "answer": "1"}, "line 2: the model's chat template refuses"),
        ({"prompt": "a" * 40, "answer": "1"}, "line 2: the prompt has 41 tokens, expected 1 to .* = 40"),
    ],
)
def test_a_bad_row_is_named_or_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture, line: object, reason: str
) -> None:
    path = write(tmp_path, row(1), line, row(3))
    config = DataConfig(max_prompt_length=40)
    with pytest.raises(ValueError, match=rf"train\.jsonl: 1 of 3 rows cannot be used: .*{reason}.*bad_rows: drop"):
        PromptReader(config, tokenizer, MATH).load(path, "train")
    config.bad_rows = "drop"
    with caplog.at_level(logging.WARNING):
        prompts, report = PromptReader(config, tokenizer, MATH).load(path, "train")
    assert [prompt.index for prompt in prompts] == [0, 2]
    assert [number for number, _ in report.dropped] == [2]
    assert "1 of 3 rows cannot be used: line 2" in caplog.text


def test_many_bad_rows_are_summed_up(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, *["no"] * 9)
    with pytest.raises(ValueError, match=r"9 of 9 rows.*line 1: .*line 5: [^;]*; and 4 more. Correct them"):
        PromptReader(DataConfig(), tokenizer).load(path, "train")
    with pytest.raises(ValueError, match=r"9 of 9 rows.*No row is left"):
        PromptReader(DataConfig(bad_rows="drop"), tokenizer).load(path, "train")


def test_broken_text_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "\xff"}\r\n\r\n')
    good, bad = load_rows(str(path), "train")
    assert good.columns == {"prompt": "a"}
    assert bad.number == 2 and "utf-8" in bad.problem


def test_columns_are_checked_as_a_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, {"prompts_": "a", "gold": "1"})
    with pytest.raises(
        ValueError, match=r"no column 'prompt'; it has prompts_, gold. Set data.prompt_column to 'prompts_'"
    ):
        PromptReader(DataConfig(), tokenizer).load(path, "train")
    config = DataConfig(prompt_column="prompts_")
    with pytest.raises(ValueError, match=r"no column 'answer'.*data\.answer_column, or to null"):
        PromptReader(config, tokenizer).load(path, "train")
    config.answer_column = "gold"
    ((prompt,), _) = PromptReader(config, tokenizer, MATH).load(path, "train")
    assert prompt.columns == {"gold": "1", "answer": "1"}
    config.answer_column = None
    ((prompt,), _) = PromptReader(config, tokenizer, MATH).load(path, "train")
    assert prompt.columns == {"gold": "1"}
    with pytest.raises(ValueError, match=r"column.* completions, which are names of other arguments of rewards"):
        PromptReader(DataConfig(), tokenizer).load(write(tmp_path, row(1, completions="a")), "train")


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    write(tmp_path, "", " ")
    with pytest.raises(ValueError, match=r"train\.jsonl is empty"):
        load_rows(str(tmp_path / "train.jsonl"), "train")
    Dataset.from_dict({"prompt": [], "answer": []}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet is empty"):
        load_rows(str(tmp_path / "train.parquet"), "train")
    with pytest.raises(FileNotFoundError, match=r"no file .*trian\.jsonl.*near it: .*train\.jsonl"):
        load_rows(str(tmp_path / "trian.jsonl"), "train")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        load_rows(str(tmp_path / "nowhere" / "train.csv"), "train")
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected a file that ends in one of \.jsonl"):
        load_rows(str(tmp_path / "train.txt"), "train")
    with pytest.raises(ValueError, match="neither a file or directory nor a data set's hub id"):
        load_rows("some/where/else", "train")


def test_columns_that_cannot_be_decoded_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound needs a package, and may be broken: `datasets` raises where it decodes the first row."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_list([{**row(1), "sound": {"bytes": b"RIFF", "path": None}}])
    table.cast_column("sound", datasets.Audio()).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"cannot be decoded .*write the data without its columns of sound"):
        load_rows(str(tmp_path / "train.parquet"), "train")
    with pytest.raises(ValueError, match="row 1 of the data cannot be decoded"):
        open_rows(str(tmp_path / "train.parquet"), "train")[0]


def test_other_formats_and_directories(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [row(1), row(-22)]
    write(tmp_path, json.dumps(rows), name="train.json")
    write(tmp_path, "prompt,answer", *(f"{r['prompt']},{r['answer']}" for r in rows), name="train.csv")
    write(tmp_path, "prompt\tanswer", *(f"{r['prompt']}\t{r['answer']}" for r in rows), name="train.tsv")
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    for name in ("train.json", "train.csv", "train.tsv", "set/train.parquet", "set"):
        prompts, report = PromptReader(DataConfig(), tokenizer, MATH).load(str(tmp_path / name), "train")
        assert [prompt.text for prompt in prompts] == [r["prompt"] for r in rows], name
        assert [int(prompt.columns["answer"]) for prompt in prompts] == [1, -22], name
        assert report.unit == "row"
    with pytest.raises(ValueError, match=r"split 'test'.*cannot be loaded: .*'train'"):
        load_rows(str(tmp_path / "set"), "test")
    with pytest.raises(ValueError, match=r"subset 'main'.*cannot be loaded: .*'default'"):
        load_rows(str(tmp_path / "set"), "train", "main")
    write(tmp_path, "{broken", name="broken.json")
    with pytest.raises(ValueError, match=r"broken\.json.* cannot be loaded: .*JSON"):
        load_rows(str(tmp_path / "broken.json"), "train")


def test_values_are_what_a_file_says(tmp_path: Path) -> None:
    texts = [
        "00",
        "1e5",
        "NA",
        "null",
        "nan",
        "2024-01-01",
        "2024-01-02 10:00",
        "12345678901234567890123",
        "True",
        "1,2",
    ]
    write(tmp_path, "prompt,answer", *(f'What?,"{text}"' for text in texts), name="train.csv")
    write(tmp_path, "\ufeffprompt\tanswer", *(f"What?\t{text}" for text in texts), name="train.tsv")
    write(tmp_path, json.dumps([{"prompt": "What?", "answer": text} for text in texts]), name="train.json")
    write(tmp_path, *({"prompt": "What?", "answer": text} for text in texts), name="lines.json")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text((tmp_path / "train.csv").read_text())
    for name in ("train.csv", "train.tsv", "train.json", "lines.json", "set"):
        for rows in (load_rows(str(tmp_path / name), "train"), open_rows(str(tmp_path / name), "train")):
            assert [rows[n].columns["answer"] for n in range(len(rows))] == texts, name
    numbers = [1, -2.5, True, None, 10**30, ["a", 1]]
    write(tmp_path, json.dumps([{"answer": number} for number in numbers]), name="numbers.json")
    assert [row.columns["answer"] for row in load_rows(str(tmp_path / "numbers.json"), "train")] == numbers


def test_cells_of_a_csv_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, "prompt,answer,level", '"two\nlines, ""so""",01,4', "What?,,5", "", "What, then?,2,3",
                 "Short,7", name="train.csv")  # fmt: skip
    rows = load_rows(path, "train")
    assert rows[0].columns == {"prompt": 'two\nlines, "so"', "answer": "01", "level": "4"}
    assert rows[1].columns["answer"] is None and rows[3].columns["level"] is None
    assert "4 cells, expected 3: put cells that contain a separator" in rows[2].problem
    with pytest.raises(ValueError, match=r"row 2: no 'answer'; row 3: 4 cells, expected 3"):
        PromptReader(DataConfig(), tokenizer).load(path, "train")
    dropped = DataConfig(bad_rows="drop", keep={"level": [4, 5]})
    prompts, _ = PromptReader(dropped, tokenizer).load(path, "train")
    assert [prompt.columns["answer"] for prompt in prompts] == ["01"], (
        "the condition has numbers, and texts are compared as numbers"
    )
    kept = DataConfig(bad_rows="drop", keep={"level": {"min": 4}, "answer": "01"})
    assert len(PromptReader(kept, tokenizer).load(path, "train")[0]) == 1
    with pytest.raises(ValueError, match=r"the column\(s\) 'a' occur more than once"):
        load_rows(write(tmp_path, "a,b,a", "1,2,3", name="twice.csv"), "train")
    with pytest.raises(ValueError, match=r"cells separated by ';', expected ',': save it so"):
        load_rows(write(tmp_path, "prompt;answer", "What?;0,5", name="semicolons.csv"), "train")
    with pytest.raises(ValueError, match=r"cells separated by ',', expected '\\t'"):
        load_rows(write(tmp_path, "prompt,answer", "What?,5", name="commas.tsv"), "train")
    assert len(load_rows(write(tmp_path, '"one, alone"', "What?", name="alone.csv"), "train")) == 1
    (tmp_path / "latin.csv").write_bytes("prompt,answer\né,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv.*can't decode byte 0xe9.*; save the file as UTF-8"):
        load_rows(str(tmp_path / "latin.csv"), "train")


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
@pytest.mark.parametrize("text", ['[{"role": "user", "content": "Hi"}]', " [{'content': 'Hi', 'role': 'user'}]"])
def test_messages_as_text_are_no_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, text: str
) -> None:
    cell = '"' + text.replace('"', '""') + '",1'
    lines = ["prompt,answer", cell] if name == "train.csv" else [{"prompt": text, "answer": "1"}]
    with pytest.raises(ValueError, match=r"the prompt is a text that contains a list of messages .* write the data as"):
        PromptReader(DataConfig(), tokenizer).load(write(tmp_path, *lines, name=name), "train")


def test_data_sets_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list([{"prompt": "What?", "answer": "007"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "dev": datasets.concatenate_datasets([one, one])}).save_to_disk(
        tmp_path / "two"
    )
    for place, split, count in (("one", "train", 1), ("one", "test", 1), ("two", "dev", 2), ("two/train", "test", 1)):
        rows = load_rows(str(tmp_path / place), split)
        assert [row.columns for row in rows] == [{"prompt": "What?", "answer": "007"}] * count
        assert len(open_rows(str(tmp_path / place), split)) == count
    with pytest.raises(ValueError, match=r"no split 'test', expected one of 'train', 'dev': set data\.train_split or"):
        load_rows(str(tmp_path / "two"), "test")
    with pytest.raises(ValueError, match=r"saved to disk has no subsets: set data\.subset to null"):
        load_rows(str(tmp_path / "one"), "train", "main")


def test_advice_of_datasets_names_the_option(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("prompt\nHi\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: a.csv\n- config_name: second\n  data_files: b.csv\n---\n"
    )
    with pytest.raises(ValueError, match=r"\['first', 'second'\].*; set data\.subset to one of them") as refused:
        load_rows(str(tmp_path), "train")
    assert "load_dataset" not in str(refused.value)
    assert load_rows(str(tmp_path), "train", "second")[0].columns == {"prompt": "Hi"}
    with pytest.raises(ValueError, match=r"Should be one of \['train'\]\. Set data\.train_split or data\.eval_split"):
        load_rows(str(tmp_path), "test", "first")


def test_prompts_are_rendered_as_texts_or_conversations(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    plain = render("Hi", DataConfig(), tokenizer)
    assert plain.messages is None and tokenizer.decode(plain.ids) == "<s>Hi"
    chat = render(messages, DataConfig(), tokenizer)
    assert chat.text == "<s><user>Hi</s><assistant>" and chat.messages == messages
    assert chat.ids.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(chat.ids) == chat.text
    assert chat.ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert render("Hi", DataConfig(chat_template="always"), tokenizer) == chat
    system = render("Hi", DataConfig(system_prompt="Be brief."), tokenizer)
    assert system.text == "<s><system>Be brief.</s><user>Hi</s><assistant>"
    assert system == render(messages, DataConfig(system_prompt="Be brief."), tokenizer)
    assert render("Hi", DataConfig(chat_template="never"), tokenizer) == plain
    with pytest.raises(ValueError, match="chat_template: never cannot render"):
        render(messages, DataConfig(chat_template="never"), tokenizer)
    with pytest.raises(ValueError, match=r"has a system message, and .*system_prompt adds another"):
        render([{"role": "system", "content": "No."}, *messages], DataConfig(system_prompt="Be brief."), tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        render(messages, DataConfig(), make_tokenizer(None))


def test_a_prompt_does_not_end_as_texts_of_the_tokenizer_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A completion behind an end token would begin a new text."""
    closing = make_tokenizer(None)
    frame = [("<s>", 0), ("</s>", 1)]
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=frame)
    prompts, _ = PromptReader(DataConfig(), closing).load(write(tmp_path, row(1), row(2)), "train")
    assert [closing.decode(prompt.ids) for prompt in prompts] == ["<s>What is 1?", "<s>What is 2?"]
    assert closing.decode(render("Hi</s>", DataConfig(), closing).ids) == "<s>Hi</s>", "a text may have one"
    (warning,) = caplog.records
    assert "ends texts with ['</s>']; prompts are without" in warning.getMessage()


def test_a_prompt_that_was_rendered_before_begins_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Texts of `apply_chat_template` have the BOS that the tokenizer puts before texts."""
    tokenizer = make_tokenizer(None)
    path = write(tmp_path, {"prompt": "<s><user>1?</s>", "answer": "1"}, row(2))
    prompts, _ = PromptReader(DataConfig(), tokenizer).load(path, "train")
    assert [tokenizer.decode(prompt.ids) for prompt in prompts] == ["<s><user>1?</s>", "<s>What is 2?"]
    assert [record.getMessage() for record in caplog.records] == [
        "prompts begin with ['<s>'], as the tokenizer begins texts: they have it once"
    ]


@pytest.mark.parametrize(("most", "text"), [(11, "<s>What is 1?"), (4, "<s> 1?"), (1, "?")])
def test_a_prompt_that_is_cut_keeps_its_bos(most: int, text: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None)
    config = DataConfig(max_prompt_length=most, too_long="truncate")
    (prompt,), _ = PromptReader(config, tokenizer).load(write(tmp_path, row(1)), "train")
    assert tokenizer.decode(prompt.ids) == text and len(prompt.ids) <= most


def test_the_messages_of_a_table_have_no_gaps(tmp_path: Path) -> None:
    """Parquet has all keys in all messages, and all arguments in all calls."""
    calls = "{{ m.tool_calls | tojson if 'tool_calls' in m }}"
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}CALLS{% endfor %}".replace("CALLS", calls)
    table = [
        {"prompt": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {argument: 1}, "name": "f"}}]},
                    {"role": "user", "content": "?"}], "answer": "1"} for argument in "ab"
    ]  # fmt: skip
    Dataset.from_list(table).to_parquet(tmp_path / "train.parquet")
    prompts, _ = PromptReader(DataConfig(), make_tokenizer(template)).load(str(tmp_path / "train.parquet"), "train")
    assert [prompt.text for prompt in prompts] == [
        f'<assistant>[{{"function": {{"arguments": {{"{argument}": 1}}, "name": "f"}}}}]<user>?' for argument in "ab"
    ]


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ([{"role": "system", "content": "<s>"}, {"role": "user", "content": "<s>1"}], "1 of 2 prompts .*: '<s>'$"),
        (
            [{"role": "user", "content": "<b>1</b></s>"}],
            "1 of 2 prompts have messages that spell special tokens .*'</s>'$",
        ),
        ([{"role": "assistant", "content": "1</s>"}, {"role": "user", "content": "1 É?"}], None),
        ("ÉÈ and é", "1 of 2 prompts have characters that the tokenizer does not write, .*: 'è', 'é'$"),
        ("\uff21 ﬁ", None),
    ],
)
def test_what_the_model_does_not_see_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prompt: object, word: str | None
) -> None:
    """The tokenizer loses accents, as some do, and writes other forms of letters in one form."""
    tokenizer = make_tokenizer(TEMPLATE)
    lossy = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("É", ""), normalizers.Replace("é", ""), normalizers.Replace("È", "")]
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC() if isinstance(prompt, list) else lossy
    PromptReader(DataConfig(), tokenizer).load(write(tmp_path, row(1), {"prompt": prompt, "answer": "1"}), "train")
    assert len(caplog.records) == (word is not None)
    assert word is None or re.search(word, caplog.text.strip())


def test_a_tokenizer_without_template_is_no_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path, row(1))
    with pytest.raises(ValueError, match="no chat template"):
        PromptReader(DataConfig(system_prompt="Be brief.", bad_rows="drop"), make_tokenizer(None)).load(path, "train")


def slow_order(num_prompts: int, seed: int, epoch: int) -> list[int]:
    """The twin of `permutation`: SplitMix64 with Python's integers, one number at a time."""
    import hashlib

    state = int.from_bytes(hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest(), "little")
    keys = []
    for _ in range(num_prompts):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        key = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
        keys.append(key ^ (key >> 31))
    return sorted(range(num_prompts), key=keys.__getitem__)


@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**70), st.integers(0, 10**6))
def test_sampler_equals_its_twin(num_prompts: int, batch_size: int, seed: int, step: int) -> None:
    sampler = Sampler(num_prompts, batch_size, seed)
    cursors = range(step * batch_size, (step + 1) * batch_size)
    epochs = {epoch: slow_order(num_prompts, seed, epoch) for epoch in {c // num_prompts for c in cursors}}
    assert sampler.batch_indices(step) == [epochs[c // num_prompts][c % num_prompts] for c in cursors]
    assert sampler.epoch(step) == cursors.start / num_prompts


@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_holds_every_prompt_once(num_prompts: int, batch_size: int, seed: int) -> None:
    sampler = Sampler(num_prompts, batch_size, seed)
    drawn = [index for step in range(num_prompts) for index in sampler.batch_indices(step)]
    assert len(drawn) == batch_size * num_prompts
    for start in range(0, len(drawn), num_prompts):
        assert sorted(drawn[start : start + num_prompts]) == list(range(num_prompts))


def test_orders_are_fixed_and_differ() -> None:
    assert permutation(10, 0, 0).tolist() == [2, 5, 4, 0, 9, 1, 8, 7, 6, 3]
    assert permutation(1000, 0, 0).tolist() != permutation(1000, 0, 1).tolist() != permutation(1000, 1, 0).tolist()
    assert len(Sampler(10**6, 32, 0).batch_indices(10**6)) == 32  # without going through the epochs before


def test_sampler_refuses_nothing_to_sample() -> None:
    with pytest.raises(ValueError, match="0 prompts and a batch size of 4"):
        Sampler(0, 4, 0)


def test_numbers_of_classes_are_said_to_be_that(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets

    label = datasets.ClassLabel(names=["bad", "good"])
    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", "2"], "label": [0, 1]})
    table = table.cast_column("label", label)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            prompts, _ = PromptReader(DataConfig(), tokenizer).load(str(tmp_path / name), "train")
        assert [prompt.columns["label"] for prompt in prompts] == [0, 1]
        assert "column label has numbers of classes, and rewards get these: 0 'bad', 1 'good'" in caplog.text
