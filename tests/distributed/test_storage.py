"""Policy, reference and rollout share one set of frozen weights, before and after the optimizer has stepped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import TINY, launch

from grpo_dist.config.parse import parse_config
from grpo_dist.model.config_files import load_model_config
from grpo_dist.planning.memory import Strategy
from grpo_dist.planning.predict import Predictor


def run(strategy: str | None, ranks: int, directory: Path, *options: str) -> list[str]:
    """A step with a KL term; returns its arguments."""
    arguments = [*TINY, "--train.output_dir", str(directory), "--train.num_train_steps", "1", "--loss.kl_coeff", "0.04",
                 "--logging.trackers", "[]", *options]  # fmt: skip
    done = launch(strategy, ranks, *arguments, program=["tests/distributed/storage.py"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return arguments


PLANNED: dict[str | None, Strategy] = {None: "DDP", "ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2"}


def predicted(strategy: str | None, ranks: int, arguments: list[str]) -> int:
    """Bytes of all weights that `plan` expects on a rank."""
    config = parse_config(arguments)
    parts = Predictor(config, load_model_config(config.model), "cpu").parts(ranks, PLANNED[strategy])
    names = ("frozen weights", "adapters", "policy weights", "frozen copy", "rollout weights")
    return sum(part.num_bytes for part in parts if part.name in names)


@pytest.mark.parametrize(
    ("strategy", "ranks", "dtype", "of_reference"),
    [("zero2", 2, "bfloat16", "bfloat16"), (None, 1, "float32", "bfloat16"),  # in which the model was published
     *(pytest.param(*each, each[-1], marks=pytest.mark.slow)
       for each in ((None, 1, "bfloat16"), (None, 1, "float32"),
                    ("ddp", 2, "bfloat16"), ("zero2", 2, "float32"), ("zero1", 2, "bfloat16"),
                    ("zero1", 2, "float32")))],
)  # fmt: skip
def test_frozen_weights_lie_in_one_place(
    strategy: str | None, ranks: int, dtype: str, of_reference: str, tmp_path: Path
) -> None:
    arguments = run(strategy, ranks, tmp_path, "--model.dtype", dtype, "--reference.dtype", of_reference)
    for rank in range(ranks):
        before, after = map(json.loads, (tmp_path / f"storage-{rank}.jsonl").read_text().splitlines())
        assert before["policy"] == before["rollout"] == before["reference"] > 50
        assert before["b"] == 0 < after["b"], "the optimizer has stepped"
        assert before["bytes"] == after["bytes"] == predicted(strategy, ranks, arguments)
        assert [each[name] for each in (before, after) for name in ("apart", "reference_apart")] == [0, 0, 0, 0]


@pytest.mark.parametrize("options", [("--reference.dtype", "float32"), ("--lora", "null")], ids=["other", "full"])
def test_what_lies_apart_is_counted(options: tuple[str, ...], tmp_path: Path) -> None:
    """A reference of another dtype; and a policy that is trained in float32 and computes in bfloat16."""
    arguments = run(None, 1, tmp_path, "--model.dtype", "bfloat16", "--reference.dtype", "bfloat16", *options)
    before, after = map(json.loads, (tmp_path / "storage-0.jsonl").read_text().splitlines())
    assert before["reference_apart"] > 0 and before["bytes"] == after["bytes"] == predicted(None, 1, arguments)
