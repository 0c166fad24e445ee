"""Compare predictions of `python -m grpo_dist plan` with the memory of training steps: the table of docs/memory.md.

    python docs/memory.py                        # all rows: half an hour on two cores, up to 6 GiB
    python docs/memory.py --only "28 M"          # rows whose model or setting contains this

Each row trains two steps in new processes, on models with random weights whose completions almost never end by
themselves, and measures the second step. `tensors` are the bytes of all live tensors. `process` is the resident memory
above that of the process before it loaded a model. Both are peaks of a phase, on rank 0.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_dist.algorithm.targets import with_advantages
from grpo_dist.config.parse import parse_config
from grpo_dist.config.schema import Config
from grpo_dist.distributed.deepspeed import Zero
from grpo_dist.distributed.ranks import Ranks
from grpo_dist.model.config_files import load_model_config, load_tokenizer
from grpo_dist.monitoring.metrics import pass_rates
from grpo_dist.planning.live import LiveBytes
from grpo_dist.planning.memory import STRATEGIES, Strategy, peaks
from grpo_dist.planning.predict import Predictor
from grpo_dist.train import update
from grpo_dist.trainer import build, models
from grpo_dist.trainer.collect import collect, with_reference
from grpo_dist.trainer.packs import pack_minibatches, with_old_policy

ROOT = Path(__file__).parents[1]
VOCABULARY = 4096
MODELS = {
    "0.6 M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
    "28 M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    "494 M": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
              "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measured setting."""

    model: str
    prompts: int
    group: int
    prompt: int
    new: int
    pack: int
    options: str = ""
    """Further options of the run."""
    strategy: str = "one process"

    @property
    def planned(self) -> Strategy:
        """The strategy as `plan` names it."""
        return next((each for each in STRATEGIES if each.lower().replace("-", "") == self.strategy), "DDP")

    @property
    def num_ranks(self) -> int:
        """Processes."""
        return 1 if self.strategy == "one process" else 2

    def arguments(self, folder: Path) -> list[str]:
        """Options of the run."""
        rows = "".join(json.dumps({"prompt": " ".join("7" * self.prompt)[: self.prompt], "answer": "1"}) + "\n"
                       for _ in range(2 * self.prompts))  # fmt: skip
        (folder / "data.jsonl").write_text(rows)
        given = {
            "model.name": folder / "model", "model.dtype": "float32", "reference.dtype": "float32",
            "data.train_file": folder / "data.jsonl", "data.eval_file": "null", "data.max_prompt_length": self.prompt,
            "rollout.group_size": self.group, "rollout.max_completion_length": self.new,
            "train.batch_size": self.prompts, "train.max_tokens_per_pack": self.pack, "train.num_train_steps": 2,
            "train.output_dir": folder / "run", "loss.kl_coeff": 0.04, "logging.trackers": "[]",
        }  # fmt: skip
        return [word for key, value in given.items() for word in (f"--{key}", str(value))] + self.options.split()


FULL, SAVING, SHARED = "--lora null", "--model.gradient_checkpointing true", "--reference.placement shared"
ROWS = [
    Row("0.6 M", 8, 8, 64, 64, 600), Row("0.6 M", 8, 8, 64, 64, 2400), Row("0.6 M", 8, 8, 64, 64, 2400, SAVING),
    Row("28 M", 4, 8, 128, 64, 700), Row("28 M", 4, 8, 128, 64, 1400), Row("28 M", 4, 8, 128, 64, 1400, SAVING),
    Row("28 M", 2, 16, 128, 64, 1200), Row("28 M", 4, 8, 128, 64, 700, FULL), Row("28 M", 2, 2, 1024, 32, 1100),
    *(Row("28 M", 4, 8, 128, 64, 700, strategy=name) for name in ("ddp", "zero2", "zero3")),
    Row("28 M", 4, 8, 128, 64, 700, SHARED, "zero3"), Row("28 M", 4, 8, 128, 64, 700, FULL, "zero2"),
    Row("494 M", 2, 4, 64, 32, 200, "--reference.dtype bfloat16"),
    Row("494 M", 2, 4, 64, 32, 200, f"--reference.dtype bfloat16 {SAVING}"),
]  # fmt: skip


def make_model(name: str, folder: Path) -> None:
    """Write a model of random weights with the toy's tokenizer."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, "num_key_value_heads": 2,
             "max_position_embeddings": 4096, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}  # fmt: skip
    Qwen2ForCausalLM(Qwen2Config(**shape | MODELS[name])).save_pretrained(folder)
    load_tokenizer(parse_config([]).model).save_pretrained(folder)


# --- inside a measured process ---------------------------------------------------------------------------------------


def resident(field: str = "VmRSS") -> int:
    """Resident bytes of this process now (VmRSS), or their peak since `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Reset VmHWM."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def tensor_bytes() -> int:
    """Bytes of all live tensors in this process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measured_process(arguments: list[str], report: Path) -> None:
    """Train two steps and write the peaks of the phases of the second."""
    torch.set_num_threads(1)
    empty = 0

    def load_models(
        config: Config, model_config: Any, end_ids: list[int], ranks: Ranks, resume_from: Path | None
    ) -> Any:
        """Load the models, after measuring the process without them."""
        nonlocal empty
        if isinstance(ranks.strategy, Zero):
            import deepspeed  # noqa: F401
        gc.collect()
        empty = resident()
        return models.load_models(config, model_config, end_ids, ranks, resume_from)

    build.load_models = load_models
    config = parse_config(arguments)
    parts, state = build.build(config)
    peak_bytes: dict[str, dict[str, int]] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        before = tensor_bytes()
        forget_peak()
        with LiveBytes() as live:
            yield
        if state.step:
            peak_bytes[name] = {"tensors": before + live.peak, "process": resident("VmHWM") - empty}

    for _ in range(2):
        weights = config.weights_at(state.step)
        with phase("rollout"):
            batch = with_reference(parts, collect(parts, state, state.step))
        batch = with_advantages(config, batch, weights, state.kl_coeff)
        minibatches = pack_minibatches(parts, batch)
        batch = with_old_policy(parts, batch, minibatches)
        with phase("update"):
            update(parts, state, batch, minibatches[0])
        del minibatches
        parts.engine.update_weights()
        state.after_step(state.kl_coeff, pass_rates(batch, weights))
    if parts.ranks.is_main:
        report.write_text(json.dumps(peak_bytes), encoding="utf-8")
    build.close(parts, all_ranks=True)


# --- the table -------------------------------------------------------------------------------------------------------


def measure_row(row: Row, folder: Path, arguments: list[str]) -> dict[str, dict[str, int]]:
    """The peaks of a row's phases, measured in new processes."""
    report = folder / "report.json"
    program = [__file__, "--inside", str(report), *arguments]
    launcher = [sys.executable]
    if row.num_ranks > 1:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{row.strategy}.yaml",
                     "--num_processes", str(row.num_ranks), "--main_process_port", "0"]  # fmt: skip
    # otherwise glibc keeps memory that threads have freed, and RSS includes it
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0",
                                "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run([*launcher, *program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row}:\n{done.stderr[-3000:]}")
    return json.loads(report.read_text())


def table_lines(row: Row) -> Iterator[str]:
    """The row's lines, one a phase."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(row.model, folder / "model")
        arguments = row.arguments(folder)
        config = parse_config(arguments)
        peak_bytes = measure_row(row, folder, arguments)
        parts = Predictor(config, load_model_config(config.model), "cpu").parts(row.num_ranks, row.planned)
    top = peaks(parts)
    # the reference runs on completions while the rollout goes on
    predicted = {"rollout": max(top["rollout"], top["reference"]), "update": max(top["update"], top["optimizer"])}
    setting = f"{row.prompts} × {row.group}, {row.prompt} + {row.new}, pack {row.pack}"
    for phase, bytes_ in predicted.items():
        tensors, process = (peak_bytes[phase][kind] for kind in ("tensors", "process"))
        yield (f"| {row.model} | {setting} | {row.options.replace('--', '') or '–'} | {row.strategy} | {phase} "
               f"| {bytes_ / 2**20:.1f} | {tensors / 2**20:.1f} | {bytes_ / tensors - 1:+.0%} "
               f"| {process / 2**20:.0f} | {bytes_ / process - 1:+.0%} |")  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose model, options or strategy contain this")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args()
    if given.inside:
        measured_process(rest, given.inside)
        return
    print("| model | prompts × group, tokens | options | strategy | phase | predicted MiB | tensors MiB | error "
          "| process MiB | error |\n" + "|---" * 10 + "|")  # fmt: skip
    for row in ROWS:
        if given.only in f"{row.model} {row.options} {row.strategy}":
            for line in table_lines(row):
                print(line, flush=True)


if __name__ == "__main__":
    main()
