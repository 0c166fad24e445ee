"""How long a step of the quickstart takes with something and without it, in turn in one process.

    python docs/steps_in_turn.py spinning     # threads may spin for 0.2 ms, or sleep at once; half a minute
    python docs/steps_in_turn.py drafts       # drafts are looked for where that saves time, or always
    python docs/steps_in_turn.py together     # steps of decoding and draws between them are one call, or many
    python docs/steps_in_turn.py layers       # a layer of a pack is one operation, or its own code
    python docs/steps_in_turn.py products     # oneDNN multiplies by no matrix below 65,536 numbers, or below 8,192

Prints the median of the pairs' ratios, with it over without it, and their quartiles. On a machine without other work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from grpo_dist.distributed.spinning import SPIN_COUNT, allow_long, sleeping_team

allow_long(os.environ)

from grpo_dist.config.parse import parse_config  # noqa: E402
from grpo_dist.model import decoder_layers, products  # noqa: E402
from grpo_dist.rollout.drafts import Gain  # noqa: E402
from grpo_dist.rollout.native.kernel import KernelStep  # noqa: E402
from grpo_dist.train import train_step  # noqa: E402
from grpo_dist.trainer.build import build, close  # noqa: E402

CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
UNTIMED = 6
SETTLING_SECONDS = 0.02


class WithoutSpinning:
    """Holds a team of sleeping threads, or none."""

    def __init__(self) -> None:
        self.end: Callable[[], None] | None = None

    def __call__(self, is_with: bool) -> None:
        if is_with and self.end is not None:
            self.end()
            self.end = None
        elif not is_with and self.end is None:
            self.end = sleeping_team()
        time.sleep(SETTLING_SECONDS)


def drafts(is_with: bool) -> None:
    """Let looking for drafts depend on what it saves, or not."""
    Gain.is_none = PLAIN_RULE if is_with else property(lambda _: False)  # type: ignore[method-assign, assignment]


def together(is_with: bool) -> None:
    """Let nobody look at tokens where that is not needed, or at each."""
    KernelStep.together = TOGETHER if is_with else lambda *_: None  # type: ignore[method-assign]


def layers(is_with: bool) -> None:
    """Let the operation know the calls of layers, or none."""
    decoder_layers._is_known = KNOWN if is_with else lambda *_: False


def product_sizes(is_with: bool) -> None:
    """Set from which size on oneDNN multiplies."""
    products.FEWEST_NUMBERS = 1 << (16 if is_with else 13)


PLAIN_RULE, TOGETHER, KNOWN = Gain.is_none, KernelStep.together, decoder_layers._is_known
CHOICES: dict[str, Callable[[bool], None]] = {
    "spinning": WithoutSpinning(), "drafts": drafts, "together": together, "layers": layers, "products": product_sizes
}  # fmt: skip


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choice", choices=CHOICES)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    choose = CHOICES[options.choice]
    with tempfile.TemporaryDirectory() as scratch:
        parts, state = build(parse_config(["--config", str(CONFIG), "--train.output_dir", f"{scratch}/run",
                                           "--train.num_train_steps", "1000000"]))  # fmt: skip
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for pair in range(UNTIMED + options.pairs):
            for is_with in (True, False) if pair % 2 else (False, True):
                choose(is_with)
                begun = time.perf_counter()
                train_step(parts, state)
                seconds[is_with].append(time.perf_counter() - begun)
        close(parts, all_ranks=True)
    pairs = list(zip(seconds[True][UNTIMED:], seconds[False][UNTIMED:], strict=True))
    low, middle, high = statistics.quantiles([one / other for one, other in pairs], n=4)
    ours, others = (statistics.median(each) for each in zip(*pairs, strict=True))
    print(f"{SPIN_COUNT}={os.environ[SPIN_COUNT]}: {ours:.3f} s with {options.choice}, {others:.3f} s without; "
          f"{middle:.2f} of the time ({low:.2f} to {high:.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
