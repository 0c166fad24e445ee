"""`python -m grpo_dist score`: the table, and what is said about mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_dist.cli.main import main

DATA = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(5)]


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in DATA))
    (tmp_path / "config.yaml").write_text(
        f"data: {{train_file: {tmp_path / 'data.jsonl'}, eval_file: null, max_prompt_length: 64}}\n"
        "rewards: [{name: math}, {name: length, weight: 0.5, args: {target: 1, tolerance: 8}}]\n"
        "scoring: {num_workers: 1}\n"
    )
    return ["score", "--config", str(tmp_path / "config.yaml")]


def test_gold_answers_are_scored(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "-n", "2"]) == 0
    shown = capsys.readouterr().out
    assert "What is 1 + 1?" in shown and "What is 2 + 2?" not in shown
    assert "math" in shown and "1.5" in shown and "× 0.5" in shown


def test_completions_of_a_file(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "completions.jsonl"
    rows = [{"completion": "It is 6.\x1b[31m [/red]", "prompt_index": 3}, {"completion": "8", "prompt_index": 0}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main([*options, "--completions", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "What is 3 + 3?" in shown and "[/red]" in shown and "\x1b" not in shown
    file.write_text('{"completion": "1", "prompt_index": 99}\n')
    assert main([*options, "--completions", str(file)]) == 2
    assert "no usable row with prompt_index 99" in capsys.readouterr().err
    file.write_text('{"text": "1"}\n')
    assert main([*options, "--completions", str(file)]) == 2
    assert "no text in the column `completion`" in capsys.readouterr().err


def test_completions_by_kind_of_prompt(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples of one prompt count together, in whatever order they come."""
    (tmp_path / "data.jsonl").write_text("".join(
        json.dumps({"prompt": f"What is {n} - 2?", "answer": str(n - 2), "sign": "-" if n < 2 else "+"}) + "\n"
        for n in range(4)
    ))  # fmt: skip
    drawn = [(0, "2"), (2, "0"), (3, "1"), (1, "1"), (0, "2"), (2, "0"), (3, "2"), (1, "1")]
    file = tmp_path / "completions.jsonl"
    file.write_text("".join(json.dumps({"prompt_index": n, "completion": text}) + "\n" for n, text in drawn))
    common = [*options, "--rewards", "[{name: math}]"]
    assert main([*common, "--completions", str(file), "--category", "sign"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["+", "2", "0.750", "0.750", "[0.50,", "1.00]", "1", "1", "0"] in rows
    assert ["-", "2", "0.000", "0.000", "[0.00,", "0.00]", "0", "0", "2"] in rows
    assert any(row[:3] == ["all", "4", "0.375"] and row[-3:] == ["1", "1", "2"] for row in rows)
    assert main([*common, "--category", "colour"]) == 2
    assert "--category: 'colour' given, which no row has" in capsys.readouterr().err


def test_failures_are_shown_and_judged(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing.py").write_text("def fails(completions):\n    raise RuntimeError('out of luck')\n")
    monkeypatch.chdir(tmp_path)
    assert main([*options, "--rewards", '[{name: "failing:fails"}]', "-n", "3"]) == 1
    shown = capsys.readouterr().out
    assert "unscored" in shown and "completion 0: fails failed (raised): RuntimeError: out of luck" in shown
    assert shown.count('failing.py", line 2, in fails') == 1, "where it raised, of the first alone"


def test_an_unknown_verb_and_option(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["scroe"], [*options, "--data.trian_file", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "did you mean 'data.train_file'" in capsys.readouterr().err
