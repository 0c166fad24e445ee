"""grpo_dist.train that looks at where its models' weights lie: started in the trainer's place.

After the start and at the end every rank writes down, as a line of storage.jsonl of its own in the output directory,
what is counted there.
"""

from __future__ import annotations

import json
import sys

from torch import Tensor

from grpo_dist import train
from grpo_dist.checkpoint.state import TrainState
from grpo_dist.trainer.ending import main
from grpo_dist.trainer.parts import Parts


def places(parts: Parts) -> dict[str, object]:
    """How many weights of the rollout's and the reference's model lie elsewhere than the policy's, and their bytes."""
    sizes: dict[int, int] = {}

    def addresses(parameters: dict[str, Tensor]) -> set[int]:
        sizes.update({parameter.data_ptr(): parameter.nbytes for parameter in parameters.values()})
        return {parameter.data_ptr() for parameter in parameters.values()}

    policy = addresses(dict(parts.policy.model.named_parameters()))
    assert parts.reference is not None
    reference = addresses(dict(parts.reference.policy.model.named_parameters()))
    with parts.rollout_model.open():
        rollout = addresses(dict(parts.rollout_model.tree.named_parameters()))
    return {
        "policy": len(policy), "rollout": len(rollout), "reference": len(reference), "apart": len(rollout - policy),
        "reference_apart": len(reference - policy), "bytes": sum(sizes.values()), "b": float(sum(
            parameter.abs().sum() for name, parameter in parts.policy.named_parameters() if ".lora_B" in name
        )),
    }  # fmt: skip


def looked_at(parts: Parts, state: TrainState) -> None:
    """Train, and write down the places before and after."""
    with (parts.directory / f"storage-{parts.ranks.rank}.jsonl").open("w") as file:
        file.write(json.dumps(places(parts)) + "\n")
        train.train(parts, state)
        file.write(json.dumps(places(parts)) + "\n")


if __name__ == "__main__":
    sys.exit(main(looked_at))
