"""`python -m grpo_dist bench`: time a step, and in turn the same step of TRL or the same rollouts of vLLM.

    python -m grpo_dist bench
    python -m grpo_dist bench --workload medium --against trl
    python -m grpo_dist bench --workload medium --model MODEL --against vllm --peer_python ~/vllm-env/bin/python

The peer takes its step first. Ours has the same prompts, and completions of exactly the lengths of the peer's. A
workload is a model and the sizes of a step; the models of all but quickstart have random weights. TRL comes with the
extra `bench`, or is in the environment of --peer_python.

Options that are not listed here are those of a training config.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import yaml

from ...distributed import spinning
from .tables import Pair, pairs_table, summary_row, table
from .turns import Worker, signals_unwind
from .workloads import WORKLOADS, Workload, model_of, write_prompts

PROMPTS = "prompts.jsonl"
PEERS = {"trl": "TRL", "vllm": "vLLM"}
PEER_MICRO_BATCH = 8
"""Most sequences of the peer's micro-batch on a GPU. The activations of a full step fit on no GPU."""
SAME_WORK = 0.05
"""The peer's completion tokens may differ from ours by this share."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("--workload", nargs="+", default=["quickstart"], choices=list(WORKLOADS), metavar="NAME",
                        help=f"workloads to time: {', '.join(WORKLOADS)} (quickstart)")  # fmt: skip
    parser.add_argument("--model", help="your own model, by hub id or path, with the sizes of the workload")
    for name, what in (
        ("num_prompts", "prompts a step"), ("group_size", "completions a prompt"), ("prompt_tokens", "longest prompt"),
        ("max_new_tokens", "longest completion"), ("mean_new_tokens", "mean completion of a generated model"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what}, in place of the workload's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="in place of the workload's")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="timed steps, after one untimed step (3)")
    parser.add_argument("--kl_coeff", type=float, default=0.04, metavar="X", help="coefficient of the KL term (0.04)")
    parser.add_argument("--lora_r", type=int, default=16, metavar="N",
                        help="rank of the adapters (16); 0: none, and vLLM's model is the same as ours")  # fmt: skip
    parser.add_argument("--against", choices=list(PEERS),
                        help="also time a peer, in turn: trl in steps, vllm in rollouts alone")  # fmt: skip
    parser.add_argument("--peer_python", default=sys.executable, metavar="FILE",
                        help="the Python of an environment with trl==1.16.0 or vllm==0.32.0 (this one)")  # fmt: skip
    parser.add_argument("--peer_continuous_batching", action="store_true", help="TRL's faster generation on a GPU")
    parser.add_argument("--peer_micro_batch", type=int, metavar="N",
                        help=f"TRL's sequences a micro-batch (on a GPU {PEER_MICRO_BATCH}, on a CPU all of a step)"
                        )  # fmt: skip
    parser.add_argument("--profile", type=Path, metavar="DIR",
                        help="directory for a profile of one more step, for https://ui.perfetto.dev")  # fmt: skip
    parser.add_argument("--models_dir", type=Path, metavar="DIR", help="directory to keep generated models in")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Time and print. `rest` overrides our config. Raises ValueError."""
    if options.pairs < 1:
        raise ValueError(f"--pairs: {options.pairs} given, expected at least 1")
    from ...distributed.device import set_up_cuda  # imports torch: an error in the options should not wait for it

    set_up_cuda()  # the workers inherit it: both sides have the same allocator settings
    changes = {name: getattr(options, name) for name in (
        "model", "num_prompts", "group_size", "prompt_tokens", "max_new_tokens", "mean_new_tokens", "dtype")
        if getattr(options, name) is not None}  # fmt: skip
    print(f"{machine()}\n", flush=True)
    peer = PEERS.get(options.against)
    rows: list[dict[str, str]] = []
    with signals_unwind(), tempfile.TemporaryDirectory(prefix="grpo_dist-bench-") as scratch:
        for name in options.workload:
            workload = replace(WORKLOADS[name], **changes)
            pairs = time_workload(workload, options, rest, Path(scratch) / name)
            if peer:
                print(pairs_table(name, pairs, peer) + "\n", flush=True)
            rows.append(summary_row(name, pairs, peer))
            print(f"{name}: {rows[-1]['s a step']} s a step", file=sys.stderr, flush=True)
    print(table([list(rows[0]), *(list(row.values()) for row in rows)]))
    return 0


def time_workload(workload: Workload, options: argparse.Namespace, rest: Sequence[str], scratch: Path) -> list[Pair]:
    """The timed steps of one workload, without the first of each side. Raises ValueError if the work differs."""
    scratch.mkdir()
    model = model_of(workload, options.models_dir or scratch)
    num_steps = options.pairs + 1
    if options.profile:
        rest = [*rest, "--logging.profile_step", str(num_steps + 1)]
    is_rollout = options.against == "vllm"
    pairs = []
    with ExitStack() as opened:
        ours = opened.enter_context(ours_in_turn(
            workload, model, scratch, num_steps=num_steps + bool(options.profile), rest=rest,
            kl_coeff=options.kl_coeff, lora_r=options.lora_r,
        ))  # fmt: skip
        theirs = None
        if options.against:
            command = their_command(workload, options, model, scratch)
            # its threads wait as they do without this package
            without = [spinning.SPIN_COUNT] if spinning.sets_count else []
            theirs = opened.enter_context(Worker(command, scratch / options.against, without=without))
        for _ in range(num_steps):
            their_step = theirs.step(None) if theirs else None
            lengths = their_step["lengths"] if their_step else None
            pairs.append(Pair(ours.step(lengths, is_rollout=is_rollout), their_step))
        if options.profile:
            answer = ours.step(lengths, is_rollout=is_rollout)
            options.profile.mkdir(parents=True, exist_ok=True)
            shutil.copy(answer["profile"], options.profile / f"{workload.name}.json.gz")
    for pair in pairs[1:]:
        if pair.theirs and abs(pair.their_tokens / pair.tokens - 1) > SAME_WORK:
            raise ValueError(f"{workload.name}: {pair.tokens:.0f} completion tokens against the peer's "
                             f"{pair.their_tokens}: not the same work")  # fmt: skip
    return pairs[1:]


def ours_in_turn(
    workload: Workload, model: str, scratch: Path, *, num_steps: int, kl_coeff: float, lora_r: int, rest: Sequence[str]
) -> Worker:
    """Our worker for `num_steps` steps. Writes the prompts to `scratch`. `rest` overrides the config."""
    write_prompts(workload, num_steps, scratch / PROMPTS)
    longest = workload.prompt_tokens + workload.max_new_tokens
    config = {
        "model": {"name": model, "dtype": workload.dtype},
        "lora": {"r": lora_r, "alpha": 2.0 * lora_r} if lora_r else None,
        "reference": {"dtype": workload.dtype},
        "data": {"train_file": str(scratch / PROMPTS), "eval_file": None, "answer_column": None,
                 "max_prompt_length": max(workload.prompt_tokens, 64)},
        "rollout": {"group_size": workload.group_size, "max_completion_length": workload.max_new_tokens},
        "rewards": [{"name": "grpo_dist.cli.bench.turns:parity"}],
        "loss": {"kl_coeff": kl_coeff},
        "optim": {"learning_rate": 1e-5, "scheduler": "constant"},
        "train": {"batch_size": workload.num_prompts, "num_train_steps": 1_000_000, "eval_every": 0, "save_every": 0,
                  "max_tokens_per_pack": max(4096, longest), "output_dir": str(scratch / "out")},
        "logging": {"trackers": [], "log_completions": False},
    }  # fmt: skip
    path = scratch / "ours.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return Worker([sys.executable, "-m", "grpo_dist.cli.bench.ours", "--config", str(path), *rest], scratch / "ours")


def their_command(workload: Workload, options: argparse.Namespace, model: str, scratch: Path) -> list[str]:
    """The command of the peer's worker."""
    if workload.model == "toy":
        from ...model.toy import toy_path

        model = str(toy_path())
    script = Path(__file__).with_name(f"peer_{options.against}.py")
    command = [options.peer_python, str(script), "--model", model, "--prompts", str(scratch / PROMPTS),
               "--dtype", workload.dtype]  # fmt: skip
    for name in ("num_prompts", "group_size", "max_new_tokens"):
        command += [f"--{name}", str(getattr(workload, name))]
    if options.against == "vllm":
        return command
    command += ["--out", str(scratch / "trl" / "out"), "--kl_coeff", str(options.kl_coeff),
                "--lora_r", str(options.lora_r),
                "--micro_batch", str(peer_micro_batch(options.peer_micro_batch, workload))]  # fmt: skip
    return command + ["--continuous_batching"] * options.peer_continuous_batching


def peer_micro_batch(given: int | None, workload: Workload) -> int:
    """TRL's sequences a micro-batch: as given, or a full step on a CPU, or the largest divisor of one that fits a GPU.

    Raises ValueError if a step is not divisible by the given number.
    """
    from ...distributed.device import computes_on_gpu

    total = workload.num_prompts * workload.group_size
    if given is None:
        most = PEER_MICRO_BATCH if computes_on_gpu() else total
        return max(size for size in range(1, most + 1) if total % size == 0)
    if given < 1 or total % given:
        raise ValueError(f"--peer_micro_batch: {given} given, expected a divisor of the {total} sequences of a step of "
                         f"{workload.name}")  # fmt: skip
    return given


def machine() -> str:
    """The machine, in one line."""
    import torch

    if torch.cuda.is_available():
        where = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    else:
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"
