"""How much faster rollouts are with drafts, in three epochs over the same prompts; and that they draw the same.

Also beside rollouts without drafts in which each token is looked at, as with stop strings or a truncated distribution.

    python -m grpo_dist.train --config configs/carry.yaml
    python docs/draft_speed.py runs/carry/final                  # 4 x 4 completions of at most 60 tokens; a minute
    python docs/draft_speed.py runs/carry/final --prompts 16 --group 8

The three rollouts of an epoch have the same prompts and noise, in turn, in processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.model import attention
from grpo_dist.rollout import NativeDecoder, Request, decode_all
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.types import Trajectory


class LookedAtStep(KernelStep):
    """A step after which each token is looked at."""

    def together(self, _: object) -> None:
        """See `SeveralTokensStep`."""


EPOCHS, TOKENS = 3, 60
ROWS = Path(__file__).parents[1] / "configs/data/carry_train.jsonl"


def main() -> None:
    """Print the median ratio of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, attn_implementation=attention.NAME, dtype=torch.float32
    ).eval()  # fmt: skip
    prompts = prompts_of(tokenizer)
    ratios: list[list[tuple[float, float]]] = []
    for pair in range(options.pairs):
        chosen = list(islice(prompts, options.prompts))
        ways = (KernelStep, True), (KernelStep, False), (LookedAtStep, False)
        decoders = [NativeDecoder([tokenizer.eos_token_id], TOKENS, 1 << 16, step_of=step_of, drafts=drafts)
                    for step_of, drafts in ways]  # fmt: skip
        ratios.append([])
        for epoch in range(EPOCHS):
            requests = [Request(group, sample, ids, stream_key(pair * EPOCHS + epoch, group, sample))
                        for group, ids in enumerate(chosen) for sample in range(options.group)]  # fmt: skip
            seconds, drawn = [0.0] * 3, dict[int, list[Trajectory]]()
            for which in (0, 1, 2) if pair % 2 else (2, 1, 0):
                begun = time.process_time()
                drawn[which] = decode_all(decoders[which], model, requests)
                seconds[which] = time.process_time() - begun
            assert drawn[0] == drawn[1] == drawn[2], "drafts have changed a completion"
            ratios[-1].append((seconds[1] / seconds[0], seconds[2] / seconds[0]))
    for epoch, each in enumerate(zip(*ratios, strict=True)):
        plain, looked_at = (
            f"{statistics.median(column):.2f} times as fast as {name} ({min(column):.2f} to {max(column):.2f})"
            for name, column in zip(("without", "one token at a time"), zip(*each, strict=True), strict=True)
        )
        print(f"epoch {epoch + 1}: {plain}, {looked_at}")


def prompts_of(tokenizer: AutoTokenizer) -> Iterator[list[int]]:
    """The ids of the data's prompts."""
    for line in ROWS.read_text().splitlines():
        yield tokenizer(json.loads(line)["prompt"])["input_ids"]


if __name__ == "__main__":
    main()
