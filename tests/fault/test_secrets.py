"""What a run must not tell, and how long its ranks wait: one training, looked at from all sides."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launching import ROOT, TINY, launch

SECRETS = {"HF_TOKEN": "hf_s3cr3tOfTheHub", "WANDB_API_KEY": "s3cr3tOfTheTracker", "MY_PASSWORD": "s3cr3tPassword",
           "JUDGE_KEY": "s3cr3tOfTheJudge"}  # fmt: skip
IN_CONFIG = "s3cr3tInTheConfig"
REWARDS = '''
import json, os, pathlib

def looks_around(completions, directory, api_key, log_extra, **_):
    """What this reward sees of the environment, told to everything it can tell."""
    assert api_key == "s3cr3tInTheConfig"
    pathlib.Path(directory, f"plain.{os.getpid()}").write_text(json.dumps(dict(os.environ)))
    print(dict(os.environ))
    log_extra("environment", [str(dict(os.environ))] * len(completions))
    return [float(len(text)) for text in completions]

def is_trusted(completions, directory, **_):
    pathlib.Path(directory, f"trusted.{os.getpid()}").write_text(json.dumps(dict(os.environ)))
    return [0.0] * len(completions)
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training under ZeRO-3 whose environment and config hold secrets: its folder, and all it printed."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "seen").mkdir()
    (folder / "nosy.py").write_text(REWARDS)
    rewards = [
        {"name": "nosy:looks_around", "args": {"directory": str(folder / "seen"), "api_key": IN_CONFIG}},
        {"name": "nosy:is_trusted", "args": {"directory": str(folder / "seen")}, "environment": ["JUDGE_KEY"]},
    ]
    (folder / "config.yaml").write_text(json.dumps({"rewards": rewards}))
    done = launch("zero3", 2, *TINY, "--config", str(folder / "config.yaml"), "--train.output_dir", str(folder / "run"),
                  "--train.num_train_steps", "2", program=["tests/fault/faulty.py"],
                  environment={"FAULT": "tell@update:1", "PYTHONPATH": f"{ROOT}:{folder}", **SECRETS})  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout + done.stderr


def test_no_secret_is_left_behind_or_printed(run: tuple[Path, str]) -> None:
    folder, told = run
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "state.json", "step_000001.parquet"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    for secret in (*SECRETS.values(), IN_CONFIG):
        assert secret not in told
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_rewards_see_only_the_secrets_they_name(run: tuple[Path, str]) -> None:
    folder, _ = run
    plain = [json.loads(path.read_text()) for path in (folder / "seen").glob("plain.*")]
    trusted = [json.loads(path.read_text()) for path in (folder / "seen").glob("trusted.*")]
    assert plain and not any(set(SECRETS) & set(seen) for seen in plain)
    assert trusted and all(set(SECRETS) & set(seen) == {"JUDGE_KEY"} for seen in trusted)


def test_all_process_groups_wait_as_long(run: tuple[Path, str]) -> None:
    """Those that DeepSpeed makes for itself, too: their defaults are 10 and 30 minutes."""
    waits = re.findall(r"process group \(.*?\) waits (.*)", run[1])
    assert len(waits) >= 3
    assert set(waits) == {"12:00:00"}
