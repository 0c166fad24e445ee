"""TRL's worker: its unchanged GRPOTrainer, which waits for a request at the end of each step.

It runs as a script in an environment that has TRL. Of this package it imports only `turns.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import connect, let_go, own_peak_gib, parity


def trainer_of(options: argparse.Namespace, reward: object, clock: TrainerCallback) -> GRPOTrainer:
    """The trainer for the workload: one process, LoRA on all linear layers, no logging, no saving."""
    torch.manual_seed(0)
    has_gpu = torch.cuda.is_available()
    prompts = [json.loads(line)["prompt"] for line in Path(options.prompts).read_text(encoding="utf-8").splitlines()]
    total = options.num_prompts * options.group_size
    config = GRPOConfig(
        output_dir=options.out, per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=total // options.micro_batch, num_generations=options.group_size,
        max_completion_length=options.max_new_tokens, max_steps=len(prompts) // options.num_prompts,
        beta=options.kl_coeff, learning_rate=1e-5, lr_scheduler_type="constant", temperature=1.0, report_to="none",
        save_strategy="no", logging_strategy="no", use_cpu=not has_gpu, bf16=options.dtype == "bfloat16",
        gradient_checkpointing=False, disable_tqdm=True, shuffle_dataset=False,
        use_transformers_continuous_batching=options.continuous_batching,
    )  # fmt: skip
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)),
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"), reward_funcs=reward,
        args=config, train_dataset=Dataset.from_dict({"prompt": prompts}), callbacks=[clock],
        peft_config=LoraConfig(r=options.lora_r, lora_alpha=2 * options.lora_r, target_modules="all-linear",
                               task_type="CAUSAL_LM") if options.lora_r else None,
    )  # fmt: skip


def main() -> None:
    """Take steps until the request to end."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("model", "prompts", "out", "dtype"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("num_prompts", "group_size", "max_new_tokens", "lora_r", "micro_batch"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--kl_coeff", type=float, required=True)
    parser.add_argument("--continuous_batching", action="store_true")
    options = parser.parse_args()
    lengths: list[int] = []

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return parity(completion_ids)

    class Turns(TrainerCallback):
        rollout_seconds = 0.0

        def timed(self, generate: Callable[..., object]) -> Callable[..., object]:
            def forward(*arguments: object, **more: object) -> object:
                start = time.perf_counter()
                try:
                    return generate(*arguments, **more)
                finally:
                    self.rollout_seconds += time.perf_counter() - start

            return forward

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.line = connect()
            self.wait()

        def on_step_end(self, *_: object, **__: object) -> None:
            peak = own_peak_gib()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() / 2**30
            seconds = time.perf_counter() - self.start
            let_go()
            self.line.send({"seconds": seconds, "rollout_seconds": self.rollout_seconds, "lengths": list(lengths),
                            "peak_gib": peak})  # fmt: skip
            lengths.clear()
            self.rollout_seconds = 0.0
            self.wait()

        def wait(self) -> None:
            if self.line.recv() is None:
                os._exit(0)
            self.start = time.perf_counter()

    turns = Turns()
    trainer = trainer_of(options, reward, turns)
    for name in ("generate", "generate_batch"):  # what it calls of the model, with and without continuous batching
        setattr(trainer.model, name, turns.timed(getattr(trainer.model, name)))
    trainer.train()


if __name__ == "__main__":
    main()
