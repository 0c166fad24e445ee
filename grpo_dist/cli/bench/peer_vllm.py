"""vLLM's worker: it draws the completions of a step's prompts for each request, with the model alone.

It runs as a script in an environment that has vLLM. Of this package it imports only `turns.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from turns import connect, own_peak_gib
from vllm import LLM, SamplingParams


def main() -> None:
    """Draw until the request to end."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model", "prompts", "dtype"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("num_prompts", "group_size", "max_new_tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # a seeded prompt that is computed in parts ends vLLM 0.32 on a CPU: "CPU Generator does not use offset"
    engine = LLM(
        options.model, dtype=options.dtype, seed=0, enforce_eager=on_cpu, gpu_memory_utilization=0.4,
        enable_chunked_prefill=not on_cpu,
    )  # fmt: skip
    tokenizer = engine.get_tokenizer()
    prompts = [
        tokenizer(json.loads(line)["prompt"]).input_ids
        for line in Path(options.prompts).read_text(encoding="utf-8").splitlines()
    ]
    line = connect()
    step = 0
    while line.recv() is not None:
        here = [prompts[n % len(prompts)] for n in range(step * options.num_prompts, (step + 1) * options.num_prompts)]
        # the log-probability of each drawn token belongs to a rollout
        sampling = SamplingParams(n=options.group_size, max_tokens=options.max_new_tokens, seed=step, logprobs=0)
        start = time.perf_counter()
        answers = engine.generate([{"prompt_token_ids": ids} for ids in here], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        lengths = [len(each.token_ids) for answer in answers for each in answer.outputs]
        line.send({"seconds": seconds, "lengths": lengths, "peak_gib": own_peak_gib()})
        step += 1


if __name__ == "__main__":
    main()
