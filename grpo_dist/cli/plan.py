"""`python -m grpo_dist plan`: predict the memory of each GPU, and the counts of a step, for any number of GPUs.

    python -m grpo_dist plan --config configs/quickstart.yaml --ranks 1,8,64 --gpu-memory 80GiB

Only the config of the model is loaded. Parameters are counted and the passes of an update are traced on tensors without
memory. All prompts and completions have full length. The exit status is 1 if --gpu-memory is given and no strategy fits
for one of the numbers of ranks. docs/memory.md compares predictions with measurements.

Options that are not listed here are those of a training config.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config.parse import parse_config
from ..distributed.process import imports
from ..planning.memory import RESERVE, SHARDS_WEIGHTS, STRATEGIES, Phase, Strategy, peaks
from ..planning.tables import readable, table_of
from ..text.plain import write_stage
from ..text.result_console import ResultConsole

if TYPE_CHECKING:
    from ..planning.predict import Predictor

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb. The parser of a run reads the others, such as `--config`."""
    parser.add_argument("--ranks", default="1,8,64", metavar="N,N,…", help="numbers of GPUs (1,8,64)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory of a GPU, such as 80GiB, to see what fits")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu",
                        help="device of `auto` dtypes: bfloat16 on a gpu, float32 on a cpu (gpu)")  # fmt: skip


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Predict and print. Raises ValueError, OSError."""
    ranks = parse_ranks(options.ranks)
    limit = None if options.gpu_memory is None else parse_size(options.gpu_memory)
    config = parse_config(list(rest))
    with imports(write_stage):
        from ..model.adapter import with_adapter
        from ..model.config_files import load_model_config
        from ..monitoring.console import set_up_logging
        from ..planning.predict import Predictor

    set_up_logging()
    config = with_adapter(config)
    most_bytes = None if limit is None else int(limit * (1 - RESERVE))
    predictor = Predictor(config, load_model_config(config.model), options.device, most_bytes)
    console = ResultConsole(highlight=False, width=None if sys.stdout.isatty() else 120)
    _print_steps(console, predictor, ranks)
    _print_parts(console, predictor, ranks[-1])
    unfit = _print_peaks(console, predictor, ranks, limit)
    if most_bytes is not None:
        for num_ranks in unfit:
            _print_advice(console, predictor, num_ranks, most_bytes)
    return int(bool(unfit))


def parse_ranks(text: str) -> list[int]:
    """Numbers of ranks in ascending order. Raises ValueError."""
    words = text.split(",")
    if not all(re.fullmatch(r"[1-9]\d{0,5}", word.strip()) for word in words):
        raise ValueError(f"--ranks: {text!r} given, expected whole numbers from 1 to 999999, such as 1,8,64")
    return sorted({int(word) for word in words})


def parse_size(text: str) -> int:
    """The bytes of a size with a unit. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"--gpu-memory: {text!r} given, expected a number with its unit, such as 80GiB or 24GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _print_steps(console: ResultConsole, predictor: Predictor, ranks: list[int]) -> None:
    from ..planning.predict import batch_arithmetic

    config = predictor.config
    write_stage(
        f"counting the parameters of {config.model.name}, and tracing the passes of an update without its weights"
    )
    counts = predictor.inputs(1, "DDP").counts
    trained = f"{counts.adapters / 1e6:,.2f} M in adapters" if counts.adapters else "all of them trained"
    console.print(f"{config.model.name}: {counts.parameters / 1e6:,.2f} M parameters, {trained}")
    if (line := predictor.describe_servers()) is not None:
        console.print(line, soft_wrap=True)
    table = table_of(f"A step: {config.train.batch_size} prompts × {config.rollout.group_size} completions, all of "
                     "full length", ["ranks", "completions a rank", "packs a rank", "largest pack", "optimizer steps"]
                     )  # fmt: skip
    for num_ranks in ranks:
        step = batch_arithmetic(config, num_ranks, predictor.share_prompts)
        table.add_row(str(num_ranks), str(step.completions_per_rank), str(step.packs_per_rank),
                      f"{step.largest_pack_tokens} tokens", str(step.optimizer_steps))  # fmt: skip
    console.print(table)


def _print_parts(console: ResultConsole, predictor: Predictor, num_ranks: int) -> None:
    """Print every part for each strategy, and the peak of each phase."""
    by_strategy = {}
    for strategy in _strategies(predictor):
        write_stage(f"predicting the memory of {num_ranks} rank(s) with {strategy}")
        by_strategy[strategy] = predictor.parts(num_ranks, strategy)
    table = table_of(f"Memory of each of {num_ranks} rank(s)", ["part", "phase", *by_strategy])
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for name, parts in by_strategy.items():
        for part in parts:
            rows.setdefault((part.name, part.phase), {})[name] = part.num_bytes
    for (part_name, phase), values in sorted(rows.items(), key=lambda row: row[0][1] != "always"):
        table.add_row(part_name, phase, *(readable(values[name]) if values.get(name) else "–" for name in by_strategy))
    table.add_section()
    tops = {name: peaks(parts) for name, parts in by_strategy.items()}
    for phase in next(iter(tops.values())):
        table.add_row("peak", phase, *(readable(top[phase]) for top in tops.values()), style="bold")
    console.print(table)


def _strategies(predictor: Predictor) -> list[Strategy]:
    """The strategies that can train the model: a quantised base is not sharded."""
    return [each for each in STRATEGIES if each not in SHARDS_WEIGHTS or predictor.quantization is None]


def _print_peaks(console: ResultConsole, predictor: Predictor, ranks: list[int], limit: int | None) -> list[int]:
    """Print the largest peak by ranks and strategy. Returns the numbers of ranks for which no strategy fits."""
    from ..planning.advice import largest_peak

    most = predictor.most_bytes
    title = "Largest peak, and its phase"
    if most is not None:
        title += f"; ✗: above {readable(most)}, {readable(limit or 0)} less a reserve of {RESERVE:.0%}"
    strategies = _strategies(predictor)
    table = table_of(title, ["ranks", *strategies])
    unfit = []
    for num_ranks in ranks:
        write_stage(f"comparing the strategies for {num_ranks} rank(s)")
        tops: list[tuple[Phase, int]] = [largest_peak(predictor, num_ranks, strategy) for strategy in strategies]
        fits = [most is None or needed <= most for _, needed in tops]
        table.add_row(str(num_ranks), *(f"{readable(needed)} {phase}{'' if fit else ' ✗'}"
                                        for (phase, needed), fit in zip(tops, fits, strict=True)))  # fmt: skip
        if not any(fits):
            unfit.append(num_ranks)
    console.print(table)
    return unfit


def _print_advice(console: ResultConsole, predictor: Predictor, num_ranks: int, most_bytes: int) -> None:
    from ..planning.advice import make_fit

    write_stage(f"looking for options with which {num_ranks} rank(s) fit")
    strategy: Strategy = "ZeRO-2" if num_ranks > 1 else "DDP"
    changes, needed = make_fit(predictor, num_ranks, strategy)
    start = f"{num_ranks} rank(s){' from ZeRO-2' if num_ranks > 1 else ''}"
    advice = f"set {'  '.join(changes)}; the peak is then" if changes else "no change helps; the peak is"
    fits = needed <= most_bytes
    console.print(f"{start}: {advice} {readable(needed)}" + ("" if fits else ", still too much; use more ranks "
                  "with ZeRO-3 or FSDP2, a smaller model, or shorter prompts and completions"),
                  soft_wrap=True)  # fmt: skip
