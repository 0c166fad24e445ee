"""Policy, reference and rollout share one set of frozen weights, before and after the optimizer has stepped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import TINY, launch


@pytest.mark.parametrize(
    ("strategy", "ranks", "dtype"),
    [(None, 1, "float32"), (None, 1, "bfloat16"), ("ddp", 2, "bfloat16"), ("zero1", 2, "bfloat16"),
     ("zero1", 2, "float32"), ("zero2", 2, "bfloat16"), ("zero2", 2, "float32")],
)  # fmt: skip
def test_frozen_weights_lie_in_one_place(strategy: str | None, ranks: int, dtype: str, tmp_path: Path) -> None:
    done = launch(
        strategy, ranks, *TINY, "--train.output_dir", str(tmp_path), "--train.num_train_steps", "1", "--model.dtype",
        dtype, "--reference.dtype", dtype, "--loss.kl_coeff", "0.04", "--logging.trackers", "[]",
        program=["tests/distributed/storage.py"],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for rank in range(ranks):
        before, after = map(json.loads, (tmp_path / f"storage-{rank}.jsonl").read_text().splitlines())
        assert before["policy"] == before["rollout"] == before["reference"] > 50
        assert before["b"] == 0 < after["b"], "the optimizer has stepped"
        assert [each[name] for each in (before, after) for name in ("apart", "reference_apart")] == [0, 0, 0, 0]
