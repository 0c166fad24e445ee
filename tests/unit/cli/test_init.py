"""`init`: a config that passes `check`, from options or from answers; and shell completion, in a real bash."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from grpo_dist.cli import init as starter
from grpo_dist.cli.main import VERBS, main
from grpo_dist.cli.shell_completion import script
from grpo_dist.config.mistakes import read_options
from grpo_dist.config.names import option_types
from grpo_dist.config.parse import parse_config

COMPLETE = """
complete_words() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
  _shtab_grpo_dist
  echo "${COMPREPLY[@]}"
}
"""
CASES = {
    ("",): set(VERBS),
    ("che",): {"check"},
    ("check", "--rollout.t"): {"--rollout.temperature", "--rollout.top_p", "--rollout.top_k"},
    ("check", "--loss.objective", ""): {"grpo", "reinforce", "cispo", "sapo"},
    ("train", "--model.trust_remote_code", ""): {"true", "false"},
    ("score", "--config", "configs/quick"): {"configs/quickstart.yaml"},
    ("score", "--compl"): {"--completions"},
    ("init", "own.yaml", "--mod"): {"--model"},
    ("train", "--preset", "dr"): {"dr_grpo"},
    ("plan", "--train.b"): {"--train.batch_size"},
    ("examples", "--train.b"): set(),
    ("chat", "accelerate_con"): {"accelerate_configs"},
    ("report", "docs", "accelerate_con"): {"accelerate_configs"},
    ("evaluate", "--model", "accelerate_con"): {"accelerate_configs"},
    ("export", "docs", "--out", "accelerate_con"): {"accelerate_configs"},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(f"{json.dumps({'question': f'What is {n} + 1?', 'solution': str(n + 1)})}\n"
                            for n in range(12)))  # fmt: skip
    return file


def test_what_options_give_passes_check(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.yaml"
    assert main(["init", str(file), "--model", "toy", "--data", str(data), "--gpus", "4"]) == 0
    output = capsys.readouterr().out
    assert "the reward is math." in output, "a default is named"
    assert f"check --config {file}" in output and "--num_processes 4 -m grpo_dist.train" in output
    config = parse_config(["--config", str(file)])
    assert (config.data.prompt_column, config.data.answer_column) == ("question", "solution")
    assert config.data.eval_file is None
    assert config.train.output_dir == "runs/own" and [reward.name for reward in config.rewards] == ["math"]
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--config", str(file)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "size", "rate"),
    [("toy", 0.49e6, 1e-3), ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6, 1e-4), ("Qwen/Qwen2.5-0.5B", 500e6, 2e-5),
     ("meta-llama/Llama-3.2-1B", 1e9, 2e-5), ("openai/gpt-oss-20b", 20e9, 1e-5), ("Qwen/Qwen3-30B-A3B", 30e9, 1e-5),
     ("microsoft/phi-4", None, 1e-5)],
)  # fmt: skip
def test_the_learning_rate_is_that_of_the_size(model: str, size: float | None, rate: float) -> None:
    assert starter.parameters_of(model) == (None if size is None else pytest.approx(size, rel=0.01))
    text = starter.render(starter.Starter(model, "data.jsonl", None, "prompt", None, "mine:reward", "runs/x"))
    assert yaml.safe_load(text)["optim"]["learning_rate"] == rate
    assert f"{rate:g} to begin with, for adapters on " in text


def test_what_is_commented_out_can_be_taken_in(data: Path, tmp_path: Path) -> None:
    text = starter.render(starter.Starter("some/model", str(data), None, "question", None, "mine:reward", "runs/x"))
    for key in starter.OFTEN_CHANGED:
        group, _, name = key.partition(".")
        text = text.replace(f"  # {name}: ", f"  {name}: ").replace(f"# {group}:\n", f"{group}:\n")
    file = tmp_path / "all.yaml"
    file.write_text(text)
    options = read_options(["--config", str(file)])
    assert options.problems == []
    assert set(options.given) == {*starter.SET, *starter.OFTEN_CHANGED, "rewards"}
    assert options.config.rewards[0].name == "mine:reward" and options.config.data.answer_column is None


def test_questions_are_asked_again_until_an_answer_fits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    answers = {"Model": ["", "some/model"], "Prompts": ["nowhere.jsonl", str(data)],
               "Held-out prompts for evaluation": ["nowhere.csv", str(data)],
               "Reward": ["mth", " mine:reward "]}  # fmt: skip

    def answer(question: str) -> str:
        asked.append(question)
        return answers.get(question.split(",")[0], [""]).pop(0)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["init", str(tmp_path / "own.yaml")]) == 0
    config = parse_config(["--config", str(tmp_path / "own.yaml")])
    assert (config.model.name, config.rewards[0].name) == ("some/model", "mine:reward")
    assert config.data.eval_file == str(data)
    assert config.data.prompt_column == "question", "the default, taken from the file"
    shown = capsys.readouterr().out
    assert "no file 'nowhere.jsonl' here" in shown and "did you mean 'math'?" in shown
    assert any("(columns: question, solution) [question]" in question for question in asked)


def test_a_directory_of_parquet_files(data: Path, tmp_path: Path) -> None:
    directory, file = tmp_path / "hub" / "data", tmp_path / "configs" / "own.yaml"
    directory.mkdir(parents=True)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for split in ("train", "test"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{split}-00000-of-00001.parquet")
    given = ["--data", str(directory.parent), "--eval_data", str(directory.parent)]
    assert main(["init", str(file), "--model", "toy", *given]) == 0
    config = parse_config(["--config", str(file)])
    assert (config.data.prompt_column, config.data.answer_column) == ("question", "solution")
    assert config.data.eval_file == str(directory.parent)


def test_mistakes_are_said_and_nothing_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.yaml"
    for words, message in {
        (): "--model is missing, and there is no terminal to ask on. Model, a hub id",
        ("--model", "toy"): "--data is missing",
        ("--model", "toy", "--data", "nowhere.csv"): "--data: no file 'nowhere.csv' here",
        ("--model", "toy", "--data", str(data), "--eval_data", "nowhere.csv"): "--eval_data: no file 'nowhere.csv'",
        ("--model", "toy", "--data", str(data), "--prompt_column", "qestion"): "did you mean 'question'?",
        ("--model", "toy", "--data", str(data), "--answer_column", "answer"): "a column of " + str(data),
        ("--model", "toy", "--data", str(data), "--reward", "mth"): "did you mean 'math'?",
        ("--model", "toy", "--data", str(data), "--answer_column", "null"): "--reward is missing",
        ("--model", "toy", "--data", str(data), "--rollout.top_k", "1"): "--rollout.top_k 1 given",
    }.items():
        assert main(["init", str(file), *words]) == 2
        assert message in capsys.readouterr().err
        assert not file.exists()
    file.write_text("mine")
    assert main(["init", str(file), "--model", "toy", "--data", str(data)]) == 2
    assert "already exists" in capsys.readouterr().err and file.read_text() == "mine"


def test_every_option_is_documented_where_comments_come_from() -> None:
    docs = starter.option_docs()
    groups = {name.rpartition(".")[0] for name in option_types()} - {""}
    missing = [name for name in option_types() if not docs.get(name) and name not in groups]
    assert missing == []


def test_completion_in_bash(tmp_path: Path) -> None:
    lines = [f"complete_words grpo-dist {' '.join(repr(word) for word in words)}" for words in CASES]
    file = tmp_path / "complete.bash"
    file.write_text("\n".join([script("bash"), COMPLETE, *lines]))
    done = subprocess.run(["bash", "--norc", str(file)], capture_output=True, text=True, timeout=60, check=True,
                          cwd=Path(__file__).parents[3])  # fmt: skip
    assert not done.stderr
    for words, answer in zip(CASES, done.stdout.splitlines(), strict=True):
        assert set(answer.split()) == CASES[words], words


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_knows_the_same_for_other_shells(shell: str) -> None:
    text = script(shell)
    for word in ("check", "rollout.temperature", "dr_grpo", "completions"):
        assert word in text
