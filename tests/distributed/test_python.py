"""docs/python.md: its scripts train, in one process and through Accelerate's notebook launcher, to the same result."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launching import ROOT, adapters, completions, free_port, launch, metrics, relative_difference

import grpo_dist
from grpo_dist import Config, run_training
from grpo_dist.config.parse import checked, parse_config

SCRIPTS = dict(re.findall(r"```python (\w+)\.py\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL))

AS_FRESH = """
import runpy, sys
for name in [each for each in sys.modules if each.partition(".")[0] == "bitsandbytes"]:
    del sys.modules[name]
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""Forks have imported PEFT and so bitsandbytes, before which the notebook launcher wants to start its processes."""


def test_the_scripts_of_the_page_train_to_the_same_result(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text.replace("processes=2", f'processes=2, use_port="{free_port()}"'))
    (tmp_path / "as_fresh.py").write_text(AS_FRESH)
    for name in SCRIPTS:
        done = launch(None, 1, f"{name}.py", program=["as_fresh.py"], directory=tmp_path,
                      environment={"PYTHONPATH": str(ROOT)})  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, several = (tmp_path / "runs" / name for name in ("one_process", "several_processes"))
    assert [line["step"] for line in metrics(several)] == [0, 1, 2, 3]
    assert [row["tokens"] for row in completions(one)] == [row["tokens"] for row in completions(several)]
    assert relative_difference(adapters(one), adapters(several)) < 1e-4
    starts = [len((run / "environment.jsonl").read_text().splitlines()) for run in (one, several)]
    assert starts == [1, 1]


@pytest.mark.parametrize("file", ["quickstart", "calculator"])
def test_a_checked_config_is_what_was_given(file: str) -> None:
    config = parse_config(["--config", str(ROOT / "configs" / f"{file}.yaml"), "--preset", "dapo"])
    assert checked(config) == config


@pytest.mark.parametrize(
    ("group", "name", "value", "message"),
    [
        ("train", "bath_size", 3, "no such option exists; did you mean 'train.batch_size'"),
        ("train", "batch_size", "many", "train.batch_size: 'many' given in Python, expected a whole number"),
        ("train", "output_dir", Path("runs"), "train.output_dir"),
        ("train", "batch_size", 0, "train.batch_size: 0 given, expected 1 or more"),
        ("train", "warmup", None, "train.warmup"),
    ],
)
def test_a_mistake_is_raised_before_anything_begins(group: str, name: str, value: object, message: str) -> None:
    config = Config()
    setattr(getattr(config, group), name, value)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run_training(config)


def test_another_thread_is_refused_before_anything_begins() -> None:
    with ThreadPoolExecutor(1) as threads, pytest.raises(ValueError, match=r"called in the thread .*expected the main"):
        threads.submit(run_training, Config()).result()


def test_a_failure_is_raised(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = Config()
    config.train.output_dir, config.data.train_file = str(tmp_path), "nowhere.jsonl"
    with pytest.raises(RuntimeError, match="status 2"):
        run_training(config)
    assert "nowhere.jsonl" in capfd.readouterr().err


def test_only_public_names_are_attributes() -> None:
    assert {name for name in grpo_dist.__all__ if not hasattr(grpo_dist, name)} == set()
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = grpo_dist.fit
