"""The table of step times on other numbers of ranks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from .predict import Predictor
from .recorded import read_run
from .scaling import Costs, Link, Predicted, RecordedStep, Setting, fit, heaviest, messages, predict
from .tables import readable, table_of

SHOWN = ("rollout", "reward", "reference", "update", "host", "fixed", "sent")


def print_outlook(console: Console, predictor: Predictor, options: argparse.Namespace, ranks: Sequence[int]) -> None:
    """Print predicted steps, strong and weak, and the bytes of a step. Raises ValueError."""
    config = predictor.config
    setting, link = setting_of(predictor, options.zero), Link(options.link_gbps, options.link_latency_us * 1e-6)
    steps, recorded_on = read_run(options.recorded)
    costs = fit(steps, recorded_on, setting)
    batch = config.train.batch_size

    def on(num_ranks: int, batch_size: int) -> Predicted:
        return predict(costs, steps, batch_size, num_ranks, setting, link)

    start = on(recorded_on, batch)
    measured = sum(step.seconds["step"] for step in steps) / len(steps)
    name = f"ZeRO-{options.zero}" if options.zero else "DDP"
    told = f"{name}, {link.gbps:g} Gbit/s and {options.link_latency_us:g} µs a rank"
    console.print(f"{len(steps)} steps of {options.recorded} on {recorded_on} rank(s): {measured:.3f} s "
                  f"measured, {start.step:.3f} s predicted. {_cost_line(costs)}", soft_wrap=True)  # fmt: skip
    for title, grows in ((f"Strong scaling, {batch} prompts a step: seconds ({told})", False),
                         (f"Weak scaling, the batch grows with the ranks: seconds ({told})", True)):  # fmt: skip
        table = table_of(title, ["ranks", "prompts", *SHOWN, "step", "straggling", "efficiency"])
        for num_ranks in ranks:
            size = max(1, batch * num_ranks // recorded_on) if grows else batch
            found = on(num_ranks, size)
            efficiency = start.step / found.step * (1 if grows else recorded_on / num_ranks)
            table.add_row(str(num_ranks), str(size), *(f"{found.seconds[part]:.3f}" for part in SHOWN),
                          f"{found.step:.3f}", f"{found.straggling:.0%}", f"{efficiency:.0%}")  # fmt: skip
        console.print(table)
    _print_messages(console, predictor, steps, ranks[-1], link)


def setting_of(predictor: Predictor, zero_stage: int) -> Setting:
    """What of a config is the same at every number of ranks."""
    config, inputs = predictor.config, predictor.inputs(1, 0 if zero_stage == 0 else 1)
    return Setting(
        counts=inputs.counts, zero_stage=zero_stage, policy_bytes=inputs.policy_bytes,
        trained_bytes=inputs.trained_bytes, max_tokens_per_pack=config.train.max_tokens_per_pack,
        optimizer_steps=config.train.updates_per_batch * config.train.num_minibatches,
        shares_prompts=predictor.share_prompts,
    )  # fmt: skip


def _cost_line(costs: Costs) -> str:
    return (f"Rollout: {costs.per_token * 1e6:.2f} µs a completion token, {costs.per_position * 1e3:.3f} ms a position "
            f"of the longest, {costs.per_prompt_token * 1e6:.2f} µs a prompt token; update: "
            f"{costs.update * 1e6:.2f} µs a token's worth")  # fmt: skip


def _print_messages(
    console: Console, predictor: Predictor, steps: Sequence[RecordedStep], num_ranks: int, link: Link
) -> None:
    """What each strategy sends in one recorded step on `num_ranks`."""
    table = table_of(f"Sent in a step on {num_ranks} rank(s)", ["strategy", "what", "bytes", "calls", "seconds"])
    for stage in range(4):
        setting = setting_of(predictor, stage)
        _, num_packs = heaviest(steps[0].groups, num_ranks, setting)
        for message in messages(steps[0].groups, num_packs, setting):
            table.add_row(f"ZeRO-{stage}" if stage else "DDP", message.name,
                          readable(message.passes * message.num_bytes * message.times), str(message.times),
                          f"{message.seconds(num_ranks, link):.4f}")  # fmt: skip
    console.print(table)
