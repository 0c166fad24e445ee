"""`python -m grpo_dist`: its table of verbs, and answers that do not wait for torch."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_dist.cli.main import VERBS, main, make_parser
from grpo_dist.config.evaluation import read_options
from grpo_dist.config.parse import parse_config

ROOT = Path(__file__).parents[3]
USES = {
    "help": (["--help"], 0, "score"),
    "help of a verb": (["score", "--help"], 0, "--completions"),
    "no verb": ([], 2, "print a table of scored completions"),
    "an unknown verb": (["scroe"], 2, "did you mean 'score'?"),
    "a mistake in an evaluation": (["evaluate", "--model", "toy", "--n", "0"], 2, "--n: 0 given, expected at least 1"),
    "a bad option": (["score", "-n", "many"], 2, "many"),
    "a bad option of a run": (["score", "--rollout.grup_size", "2"], 2, "rollout.group_size"),
    "a run's option, abbreviated": (["score", "--optim.learning_rat", "1"], 2, "did you mean 'optim.learning_rate'?"),
    "a run's option, much abbreviated": (["train", "--rollout.max_c", "8"], 2, "'rollout.max_completion_length'?"),
    "no config, abbreviated": (["train", "--conf", "configs/quickstart.yaml"], 2, "did you mean 'config'?"),
    "no check, abbreviated": (["train", "--dry"], 2, "did you mean 'dry_run'?"),
    "a mistake in a training": (["train", "--rollout.grup_size", "2"], 2, "rollout.group_size"),
    "a bad option of a check": (["check", "--ranks", "few"], 2, "few"),
    "a config without its option": (["train", "configs/quickstart.yaml"], 2, "did you mean --config configs/quickst"),
    "an infinite temperature": (["chat", "docs", "--temperature", "inf"], 2, "--temperature: inf given, expected"),
    "no run to talk to": (["chat", "confgis"], 2, "near it: configs"),
    "no run to export": (["export", "confgis"], 2, "no directory 'confgis' in "),
    "no model to evaluate": (["evaluate", "--model", "./confgis"], 2, "did you mean 'configs'?"),
    "no such config": (["score", "--config", "configs/quickstrat.yaml"], 2, "near it: configs/quickstart.yaml"),
}


@pytest.mark.parametrize("name", USES)
def test_is_answered_without_torch(name: str) -> None:
    words, status, message = USES[name]
    code = ("import sys, grpo_dist.cli.main as cli\ntry: print(cli.main(sys.argv[1:]))\n"
            "except SystemExit as end: print(end.code)\nprint('torch' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, timeout=60,
                          check=True)  # fmt: skip
    assert done.stdout.splitlines()[-2:] == [str(status), "False"], done.stderr
    assert message in done.stdout + done.stderr


@pytest.mark.parametrize("words", [["grpo_dist.train"], ["grpo_dist.evaluate", "--model", "toy"]])
def test_a_launched_module_reads_its_options_before_it_imports_torch(words: list[str]) -> None:
    # an import of torch would raise here
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *words, "--rollout.grup_size", "2"],
                          capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "rollout.grup_size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("words", "status"), [
    (["grpo_dist.train"], -signal.SIGINT), (["grpo_dist.evaluate", "--model", "toy"], -signal.SIGINT),
    (["grpo_dist", "train"], 128 + signal.SIGINT)])  # fmt: skip
def test_ctrl_c_in_an_import_prints_no_traceback(words: list[str], status: int, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\n\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, "-m", *words, "--config", "configs/quickstart.yaml"], capture_output=True,
                          text=True, cwd=ROOT, timeout=60, check=False,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"})  # fmt: skip
    assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.parametrize("local_rank", ["0", "3"])
@pytest.mark.parametrize(("read", "words"), [(parse_config, []), (read_options, ["--model", "toy"])])
def test_the_first_rank_of_a_node_answers_before_the_others(
    local_rank: str, read: Callable[[list[str]], object], words: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    already_printed: list[str] = []
    monkeypatch.setattr("grpo_dist.config.parse.time.sleep", lambda _: already_printed.append(capsys.readouterr().err))
    with pytest.raises(SystemExit) as end:
        read([*words, "--train.bath_size", "3"])
    assert end.value.code == 2
    assert already_printed == ([] if local_rank == "0" else [""])
    assert "train.bath_size" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_options_and_says_what_it_does(verb: str) -> None:
    module, summary = VERBS[verb]
    assert summary in " ".join(make_parser({verb}).format_help().split())
    assert callable(importlib.import_module(module).run)
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_of_a_verb_can_be_abbreviated(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    (verbs,) = (action for action in make_parser({verb})._actions if isinstance(action, argparse._SubParsersAction))
    actions = verbs.choices[verb]._actions
    places = [str((action.choices or ["here"])[0]) for action in actions if not action.option_strings]
    options = [option for action in actions for option in action.option_strings if option.startswith("--")]
    for option in options:
        with pytest.raises(SystemExit) as end:
            main([verb, *places, option[:-1], "1"])
        assert end.value.code == 2 and f"did you mean {option}?" in capsys.readouterr().err


def test_what_a_run_has_is_no_abbreviation_of_a_verbs_own() -> None:
    options, rest = make_parser({"bench"}).parse_known_args(["bench", "--lora", "null", "--pairs", "2"])
    assert options.lora_r == 16 and options.pairs == 2 and rest == ["--lora", "null"]


def test_no_verb_needs_torch_to_be_asked_for() -> None:
    code = ("import sys, importlib, grpo_dist.cli.main as cli\nfor module, _ in cli.VERBS.values():\n"
            "    importlib.import_module(module)\n    print(module, 'torch' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert [line for line in done.stdout.splitlines() if line.endswith("True")] == []


def test_no_page_about_runs_needs_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import grpo_dist.report.page"  # an import of torch would raise
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "-n", "0"]) == 2
    assert capsys.readouterr().err == "error: -n: 0 given, expected at least 1\n"


QUICKSTART = ("--config", "configs/quickstart.yaml")


@pytest.mark.parametrize("words", [
    ("grpo_dist", "completion", "bash"),
    ("grpo_dist", "score", "-n", "2", *QUICKSTART),
    ("grpo_dist.train", "--print_config", *QUICKSTART),
    ("grpo_dist.train", "--dry_run", *QUICKSTART),
], ids=lambda words: " ".join(words[:2]))  # fmt: skip
def test_a_reader_that_leaves_ends_a_command_in_silence(words: tuple[str, ...]) -> None:
    """As in `grpo-dist completion bash | head -1`: with the exit status of a shell for SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", *words], stdout=write, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    os.close(write)
    stages = [line for line in done.stderr.decode().splitlines() if not line.endswith(" …")]
    assert (done.returncode, stages) == (141, [])


def test_results_are_printed_by_the_console_that_lets_a_reader_leave() -> None:
    """rich's own ends a program with status 1."""
    named = [path.name for path in (ROOT / "grpo_dist").rglob("*.py") if "import Console" in path.read_text("utf-8")]
    assert sorted(named) == ["console.py", "live_view.py", "result_console.py"], "the first two are of a training's log"
