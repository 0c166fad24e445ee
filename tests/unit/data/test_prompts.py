"""Prompts: what is said about bad rows, and what the model and the rewards get."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from datasets import Dataset
from rows_on_disk import TEMPLATE, make_tokenizer, row, write
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_dist.config.schema import DataConfig, RewardConfig
from grpo_dist.data.prompts import PromptReader, render
from grpo_dist.rewards.registry import answer_checks

MATH = answer_checks([RewardConfig("math")])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEMPLATE)


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
        ("[1, 2]", r"line 2: a JSON list, expected an object.*; if the file is one array of rows, .* end in \.json"),
        ("[", r"line 2: not JSON: Expecting value.*; if the file is one array of rows, let its name end in \.json"),
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
