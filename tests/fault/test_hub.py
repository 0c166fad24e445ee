"""A model from the hub: downloaded once, in spite of a hub that is busy, and with an error that says what is wrong."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hub import Hub, served
from launching import TINY, launch

from grpo_dist.model.toy import toy_path


def start(strategy: str | None, hub: Hub, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """One step of training of the hub's model."""
    return launch(
        strategy, 2, *TINY, "--model.name", "tiny/toy", "--train.num_train_steps", "1",
        "--train.output_dir", str(folder / "run"),
        environment={"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), **environment},
    )  # fmt: skip


def test_a_busy_hub_is_asked_again_and_each_file_downloaded_once(tmp_path: Path) -> None:
    with served(toy_path()) as hub:
        hub.status, hub.failures = 429, 3
        done = start("ddp", hub, tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        downloads = {name: count for name, count in hub.requests.items() if name.startswith("GET ") and "/" not in name}
        assert (tmp_path / "cache" / "hub" / "models--tiny--toy").is_dir()
        assert downloads["GET model.safetensors"] == 1 and set(downloads.values()) == {1}
        hub.requests.clear()
        again = start(None, hub, tmp_path, HF_HUB_OFFLINE="1")
        assert again.returncode == 0 and not hub.requests, again.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "environment", "told"),
    [
        (503, {}, "the hub does not answer: "),
        (401, {"HF_TOKEN": "hf_revoked"}, "401"),
        (200, {"HF_HUB_OFFLINE": "1"}, "couldn't find them in the cached files"),
    ],
)
def test_a_hub_that_cannot_be_used(status: int, environment: dict[str, str], told: str, tmp_path: Path) -> None:
    with served(toy_path()) as hub:
        hub.status, hub.failures = status, 10**6
        done = start(None, hub, tmp_path, **environment)
    assert done.returncode == 2
    assert "error: model.name: 'tiny/toy' is no directory in " in done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr and "hf_revoked" not in done.stderr
