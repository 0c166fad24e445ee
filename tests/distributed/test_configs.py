"""Every shipped config runs as it stands, for two small steps of the toy model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from launching import ROOT, launch, metrics

from grpo_dist.rewards.sandbox import Sandbox, SandboxError

sys.path.insert(0, str(ROOT / "tests" / "unit"))
from serving import Server, chat_reply

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = (
    "--train.num_train_steps", "2", "--train.batch_size", "2", "--rollout.group_size", "2", "--train.eval_every", "0",
    "--rollout.max_completion_length", "16", "--train.num_eval_prompts", "2", "--optim.warmup_steps", "0",
    "--scoring.num_workers", "1",
)  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_runs(path: Path, tmp_path: Path) -> None:
    rewards = yaml.safe_load(path.read_text())["rewards"]
    if any(reward["name"] == "code" for reward in rewards) or path.stem == "python_tool":
        try:
            Sandbox()
        except SandboxError as error:
            pytest.skip(str(error))
    if any(reward["name"] == "reasoning_gym" for reward in rewards):
        pytest.importorskip("reasoning_gym")
    if "qlora" in path.stem:
        pytest.importorskip("bitsandbytes")
    options = ["--config", str(path), *SMALL, "--train.output_dir", str(tmp_path / "run")]
    with Server(lambda request: chat_reply("Plain enough.\nScore: 6")) as server:
        for reward in rewards:
            if reward["name"] == "judge":
                reward["args"] |= {"url": server.url, "cache": str(tmp_path / "verdicts")}
                options += ["--rewards", yaml.safe_dump(rewards, default_flow_style=True, width=10**6)]
        done = launch(None, 1, *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == 2 and last["reward/unscored"] == 0 and last["reward/mean"] is not None
