"""What is read: files of every format, directories and saved data sets, and what is said about bad ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset
from rows_on_disk import TEMPLATE, make_tokenizer, row, write
from transformers import PreTrainedTokenizerFast

from grpo_dist.config.schema import DataConfig, RewardConfig
from grpo_dist.data.prompts import PromptReader, load_rows
from grpo_dist.data.rows import open_rows
from grpo_dist.rewards.registry import answer_checks

MATH = answer_checks([RewardConfig("math")])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEMPLATE)


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
