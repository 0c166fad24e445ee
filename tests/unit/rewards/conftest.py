"""A user's modules with rewards, and pools that score with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scoring import TIMEOUT_SECONDS

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.pool.pool import ScorerPool


@pytest.fixture(scope="module")
def user_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current directory with the user's module in it, and an environment with secrets."""
    path = tmp_path_factory.mktemp("user")
    shutil.copytree(Path(__file__).with_name("user_modules"), path, dirs_exist_ok=True)
    (path / "broken_rewards.py").write_text("import os\nimport no_such_package\n")
    (path / "exiting_rewards.py").write_text("raise SystemExit('usage: …')\n")
    (path / "dying_rewards.py").write_text("import os\nos._exit(5)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name in ("HF_TOKEN", "MY_API_KEY", "db_password", "RANK", "MASTER_ADDR"):
            patch.setenv(name, "1")
        yield path


@pytest.fixture(scope="module")
def pools(user_directory: Path) -> Iterator[Callable[[str], ScorerPool]]:
    """One pool per reward that a test asks for, kept for the module: `pools("act")`."""
    kept: dict[str, ScorerPool] = {}

    def get(name: str) -> ScorerPool:
        if name not in kept:
            module = "numpy_rewards" if name in ("value", "result") else "user_rewards"
            config = RewardConfig(f"{module}:{name}", args={"factor": 2} if name == "seen" else {})
            quick = ScoringConfig(num_workers=2, timeout_seconds=TIMEOUT_SECONDS)
            kept[name] = ScorerPool([config], quick if name == "act" else ScoringConfig(num_workers=1))
        return kept[name]

    yield get
    for pool in kept.values():
        pool.close()
