"""How fast the decoding step of `decode.cpp` multiplies: GFLOP/s of its products, by rows and dtype.

    python docs/kernel_products.py smollm        # a model's directory: tests/real/make_model.py makes one; a minute
    python docs/kernel_products.py smollm --dtypes float32 --rows 16 64

One thread, in processor time. Of a step's products all are counted (linear layers and the head) and all of its time,
with norms and attention over a few tokens: the products alone are a little faster. As in a run of few sequences, few
rows read compact weights; in each second line they do not. The last column is torch's product of 64 rows with the
largest weight of a layer. Beside other work numbers are lower: memory and caches are shared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from grpo_dist.model import attention
from grpo_dist.model.large_pages import lay_together
from grpo_dist.rollout import NativeDecoder, Request, decode_all
from grpo_dist.rollout.native.cache import DecodeState
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.relaid import CompactWeights

NEW, TURNS = 12, 5


class TimedStep(KernelStep):
    """A step that notes the seconds of each call."""

    seconds: list[float] = []

    def __call__(self, tokens: Tensor, positions: Tensor, state: DecodeState) -> Tensor:
        start = time.process_time()
        logits = super().__call__(tokens, positions, state)
        TimedStep.seconds.append(time.process_time() - start)
        return logits


def of_steps(model: nn.Module, rows: int, compact: CompactWeights | None) -> float:
    """GFLOP/s of the products of steps of so many rows, the median step's."""
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    requests = [Request(0, sample, [5, 6, 7, 8], key=sample) for sample in range(rows)]
    TimedStep.seconds = []
    step_of = partial(TimedStep, compact=compact)
    decode_all(NativeDecoder([-1], NEW, 1 << 20, step_of=step_of, copied_prompt=0), model, requests)
    return 2e-9 * weights * rows / statistics.median(TimedStep.seconds)


def of_torch(model: nn.Module, rows: int = 64) -> float:
    """GFLOP/s of torch's product with the largest weight of a layer."""
    weight = max((p for name, p in model.named_parameters() if ".layers." in name), key=lambda p: p.numel()).detach()
    x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
    seconds = []
    for _ in range(TURNS):
        start = time.process_time()
        nn.functional.linear(x, weight)
        seconds.append(time.process_time() - start)
    return 2e-9 * weight.numel() * rows / statistics.median(seconds)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the directory of a model that the kernel decodes")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[4, 16, 64])
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| dtype | " + " | ".join(f"{rows} rows" for rows in given.rows) + " | torch, 64 rows |")
    print("|---" * (len(given.rows) + 2) + "|")
    for dtype in given.dtypes:
        model = AutoModelForCausalLM.from_pretrained(
            given.model, dtype=dtype, attn_implementation=attention.NAME
        ).eval()
        lay_together(model.eval(), getattr(torch, dtype))  # as a run does
        ways = CompactWeights(lambda _: True), None
        pairs = [[of_steps(model, rows, way) for way in ways] for rows in given.rows]
        for name, speeds in zip((dtype, f"{dtype}, no compact weights"), zip(*pairs, strict=True), strict=True):
            print(f"| {name} | " + " | ".join(f"{each:.0f}" for each in [*speeds, of_torch(model)]) + " |", flush=True)


if __name__ == "__main__":
    main()
