"""What an evaluation finds out before it loads a model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from grpo_dist import evaluate
from grpo_dist.config.parse import parse_config
from grpo_dist.config.places import UnwritableOutput
from grpo_dist.evaluate import Evaluation
from grpo_dist.model.config_files import load_tokenizer
from grpo_dist.model.toy import toy_path
from grpo_dist.report.evaluation import COLUMNS, report

REST: dict[str, list[object]] = {name: [] for name in COLUMNS}


def begun(
    folder: Path, *, compared: str | None = None, output: str, prompt: str = "What is 2 + 3?", reward: str = "math",
    answer: str = "5",
) -> Evaluation:  # fmt: skip
    """An evaluation of a model whose chat template writes the date, as far as its start."""
    (folder / "data.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": prompt}], "answer": answer}) + "\n"
    )
    config = parse_config(["--model.name", str(folder / "model"), "--data.eval_file", str(folder / "data.jsonl"),
                           "--rewards", f"[{{name: '{reward}'}}]"])  # fmt: skip
    evaluation = Evaluation(config, 2, folder / output, None, folder / compared if compared else None)
    evaluation.scorer.close()
    return evaluation


def test_corrected_answers_are_another_evaluation_and_a_mistaken_start_is_none(tmp_path: Path) -> None:
    """Samples that were scored by the answers before would stand beside others."""
    shutil.copytree(toy_path(), tmp_path / "model")
    tokenizer = load_tokenizer(parse_config([]).model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no_such_module"):
        begun(tmp_path, output="first", reward="no_such_module:score")
    (first,) = begun(tmp_path, output="first").prompts
    row = {**REST, "prompt_index": first.index, "prompt": first.text}
    (tmp_path / "first" / "samples_0000000.jsonl").write_text(json.dumps(row) + "\n")
    begun(tmp_path, output="first")
    with pytest.raises(ValueError, match=r"another evaluation \(answers and other columns differ\)"):
        begun(tmp_path, output="first", answer="6")
    identity = json.loads((tmp_path / "first" / "evaluation.json").read_text())
    del identity["answers and other columns"]
    (tmp_path / "first" / "evaluation.json").write_text(json.dumps(identity))
    begun(tmp_path, output="first", answer="6")  # an older version has not kept what the answers were


def test_an_evaluation_is_compared_with_another_day_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(toy_path(), tmp_path / "model")
    tokenizer = load_tokenizer(parse_config([]).model)
    tokenizer.chat_template = "{{ strftime_now('%F') }} {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(evaluate, "today", lambda: "2024-02-03")
    (first,) = begun(tmp_path, output="first").prompts
    rows = [{**REST, "prompt_index": first.index, "prompt": first.text}]
    (tmp_path / "first" / "samples_0000000.jsonl").write_text(json.dumps(rows[0]) + "\n")
    monkeypatch.setattr(evaluate, "today", lambda: "2024-02-04")
    assert begun(tmp_path, output="first").prompts == [first], "it goes on as it began"
    assert begun(tmp_path, output="second", compared="first").prompts == [first]
    assert begun(tmp_path, output="third").prompts[0].text.startswith("2024-02-04")
    with pytest.raises(
        ValueError, match=r"--compare: .*first has none of these prompts. Its first one begins '2024-02-03"
    ):
        begun(tmp_path, output="fourth", compared="first", prompt="What is 5 + 3?")
    assert not (tmp_path / "fourth").exists()


def test_samples_with_scores_of_another_version_of_a_reward_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(toy_path(), tmp_path / "model")
    tokenizer = load_tokenizer(parse_config([]).model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_reward_of_today.py"
    module.write_text("def score(completions, **columns): return [1.0] * len(completions)\n")
    begun(tmp_path, output="first", reward="my_reward_of_today:score")
    (first,) = begun(tmp_path, output="first", reward="my_reward_of_today:score").prompts
    row = {**REST, "prompt_index": first.index, "prompt": first.text}
    (tmp_path / "first" / "samples_0000000.jsonl").write_text(json.dumps(row) + "\n")
    module.write_text("def score(completions, **columns): return [0.5] * len(completions)\n")
    with pytest.raises(ValueError, match=r"first holds another evaluation \(files of rewards differ\)"):
        begun(tmp_path, output="first", reward="my_reward_of_today:score")
    begun(tmp_path, output="second", compared="first", reward="my_reward_of_today:score")
    assert "first was scored by other rewards" in caplog.text
    assert "my_reward_of_today" not in sys.modules, "it is imported in workers alone"


@pytest.mark.parametrize("text", ["", '{"prompt_index": 0}\n', "[1]\n", '{"prompt_in', "\0"])
@pytest.mark.parametrize("name", ["samples_0000000.jsonl", "evaluation.json"])
def test_damaged_files_of_an_evaluation_are_named(name: str, text: str, tmp_path: Path) -> None:
    shutil.copytree(toy_path(), tmp_path / "model")
    tokenizer = load_tokenizer(parse_config([]).model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "model")
    (first,) = begun(tmp_path, output="first").prompts
    row = {**REST, "prompt_index": first.index, "prompt": first.text}
    (tmp_path / "first" / "samples_0000000.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "first" / name).write_text(text)
    expected = f"first/{name} is damaged" if text != '{"prompt_index": 0}\n' or name[0] == "s" else "another evaluation"
    with pytest.raises(ValueError, match=expected):
        begun(tmp_path, output="first")
    if expected.endswith("damaged"):
        with pytest.raises(ValueError, match=expected):
            begun(tmp_path, output="second", compared="first")


RESULT = {**REST, "rewards": [1.0], "right": [True], "finished": [True], "tokens": [3], "answers": None}


def test_a_table_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(UnwritableOutput, match=r"--output: a file in .* cannot be written .*summary.json'"):
        report([RESULT], 1, None, tmp_path)
    assert "pass@1" in capsys.readouterr().out, "what was measured is seen all the same"


def test_a_table_that_nobody_reads_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `grpo-dist evaluate … | head -1`, after hours of samples."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w", buffering=1))
    with pytest.raises(BrokenPipeError):
        report([RESULT], 1, None, tmp_path)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.close()
    assert "pass@1" in (tmp_path / "summary.json").read_text()
