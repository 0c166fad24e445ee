"""grpo_dist.train that looks at where its models' weights lie: started in the trainer's place.

After the start and at the end every rank writes down, as a line of storage.jsonl of its own in the output directory,
what is counted there.
"""

from __future__ import annotations

import json
import sys

from torch import Tensor

from grpo_dist import train
from grpo_dist.trainer.build import Run
from grpo_dist.trainer.ending import main


def places(run: Run) -> dict[str, object]:
    """How many weights of the rollout's and the reference's model lie elsewhere than the policy's, and their bytes."""
    sizes: dict[int, int] = {}

    def addresses(parameters: dict[str, Tensor]) -> set[int]:
        sizes.update({parameter.data_ptr(): parameter.nbytes for parameter in parameters.values()})
        return {parameter.data_ptr() for parameter in parameters.values()}

    policy = addresses(dict(run.policy.model.named_parameters()))
    assert run.reference is not None
    reference = addresses(dict(run.reference.policy.model.named_parameters()))
    with run.rollout_model.open():
        rollout = addresses(dict(run.rollout_model.tree.named_parameters()))
    return {
        "policy": len(policy), "rollout": len(rollout), "reference": len(reference), "apart": len(rollout - policy),
        "reference_apart": len(reference - policy), "bytes": sum(sizes.values()), "b": float(sum(
            parameter.abs().sum() for name, parameter in run.policy.named_parameters() if ".lora_B" in name
        )),
    }  # fmt: skip


def looked_at(run: Run) -> None:
    """Train, and write down the places before and after."""
    with (run.directory / f"storage-{run.ranks.rank}.jsonl").open("w") as file:
        file.write(json.dumps(places(run)) + "\n")
        train.train(run)
        file.write(json.dumps(places(run)) + "\n")


if __name__ == "__main__":
    sys.exit(main(looked_at))
