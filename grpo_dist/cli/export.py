"""`python -m grpo_dist export`: export a trained model, reopen the export and check it.

    python -m grpo_dist export runs/quickstart --to merged
    python -m grpo_dist export runs/quickstart/checkpoints/step_40 --to adapter --out my_adapter

`merged` is a plain transformers model, `adapter` only the PEFT adapter, and `gguf-recipe` the merged model with a
script that makes GGUF files of it with llama.cpp's converter. For a run that has not ended, the export uses its newest
checkpoint. It runs in one process on the CPU.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.checks import require
from ..config.places import require_run, require_writable, writing_to
from ..config.vllm import ADAPTER_RANKS
from ..distributed.process import imports
from ..text.plain import write_stage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..checkpoint.trained import Trained

KINDS = ("merged", "adapter", "gguf-recipe")
SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", re.ASCII | re.IGNORECASE)
"""A size above 0 of which transformers can make bytes."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest allowed difference of the logits of export and policy, as a share of the largest logit. Weights are merged in
float32 and then rounded to the dtype."""


@dataclass(frozen=True)
class Gap:
    """How far a reopened export is from the trained policy."""

    difference: float
    """The largest difference of a logit, as a share of the largest logit."""
    allowed: float
    kl: float
    """Nats a token."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run_or_checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT", help="train.output_dir, or a "
                        "checkpoint in it")  # fmt: skip
    parser.add_argument("--to", choices=KINDS, default="merged", help="kind of export (merged)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output directory (RUN/exports/step_N-KIND)")
    parser.add_argument("--dtype", choices=TOLERANCE, help="dtype of a merged model (that of the training, or "
                        "float32 if it would keep less than 99 %% of the update)")  # fmt: skip
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="largest size of a weight file, such "
                        "as 500MB or 1.5GB (5GB)")  # fmt: skip
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="also upload it, as a private repository")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Export, check and print the usage. Raises ValueError, OSError, and RuntimeError if the check fails."""
    require(not rest, "arguments", list(rest), "a run or a checkpoint, and the options of --help")
    require_run(options.run_or_checkpoint)
    with imports(write_stage):
        from huggingface_hub.utils import validate_repo_id

        from ..checkpoint.trained import find
        from ..model.checks import stored_quantization
        from ..model.config_files import load_model_config
        from ..model.files import dequantized_form
        from ..monitoring.console import set_up_logging
        from ..monitoring.json_lines import read_history
        from ..report.card import write_card

    set_up_logging()
    trained = find(options.run_or_checkpoint)
    is_adapter = options.to == "adapter"
    require(not is_adapter or trained.lora is not None, "--to", options.to, "merged after full fine-tuning")
    require(not is_adapter or options.dtype is None, "--dtype", options.dtype, "none: adapters stay in float32")
    require(SIZE.fullmatch(options.max_shard_size) is not None, "--max_shard_size", options.max_shard_size,
            "a size in KB, MB, GB or TB, such as 500MB or 1.5GB")  # fmt: skip
    if options.push_to_hub:
        validate_repo_id(options.push_to_hub)
    out = options.out or trained.run / "exports" / f"step_{trained.step}-{options.to}"
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: choose another --out, or remove it")
    require_writable(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    print(f"exporting step {trained.step} of {trained.run}, from {trained.path}")
    with _emptied_on_failure(out):
        if is_adapter:
            gap = write_adapter(trained, out)
        else:
            gap = write_merged(trained, out, options.dtype, options.max_shard_size)
        form = dequantized_form(stored_quantization(load_model_config(trained.model)))
        with writing_to(out, "--out"):
            write_card(out, trained.config, read_history(trained.run), trained.step,
                       "adapter" if is_adapter else "merged", form)  # fmt: skip
            if options.to == "gguf-recipe":
                (out / "to_gguf.sh").write_text(gguf_recipe(out), encoding="utf-8")
                (out / "to_gguf.sh").chmod(0o755)
    print(f"reopened: logits differ from the policy's by {gap.difference:.1e} of the largest ({gap.allowed:.0e} is "
          f"rounding), KL from the policy is {gap.kl:.1e} nats a token")  # fmt: skip
    if options.push_to_hub:
        print(f"uploaded to {upload(out, options.push_to_hub)}")
    print("\n".join([f"\n{options.to}: {out}", *usage(trained, out, options.to)]))
    return 0


@contextmanager
def _emptied_on_failure(out: Path) -> Iterator[None]:
    """Inside, a model is written into an empty directory; what is written of one that fails is no model."""
    try:
        yield
    except BaseException:
        shutil.rmtree(out)
        raise


def write_merged(trained: Trained, out: Path, dtype: str | None, max_shard_size: str) -> Gap:
    """Write the merged model, and compare it with the policy."""
    from ..checkpoint.trained import at, load
    from ..distributed.device import DTYPES, dtype_name
    from ..model import export as saving
    from ..model.fixed_row import fixed_logits
    from ..model.load import load_causal_lm

    policy, tokenizer = load(trained)
    expected, computed = fixed_logits(policy.causal_lm), policy.causal_lm.dtype
    written, line = saving.choose_dtype(policy, keep=True, asked=None if dtype is None else DTYPES[dtype])
    print(line)
    state = saving.merged_state(policy, keep=True, dtype=written)
    with writing_to(out, "--out"):
        saving.write_merged(policy.causal_lm, state, tokenizer, out, max_shard_size)
    del policy, state  # frees memory for the reopened model
    rougher = max(written, computed, key=lambda dtype: TOLERANCE[dtype_name(dtype)])
    return compare(expected, fixed_logits(load_causal_lm(at(trained, out), written, None)), rougher)


def write_adapter(trained: Trained, out: Path) -> Gap:
    """Write the adapter, and compare it with the policy."""
    from ..checkpoint.trained import load
    from ..model import export as saving
    from ..model.fixed_row import fixed_logits
    from ..model.load import load_causal_lm
    from ..model.peft import with_saved_adapters

    policy, tokenizer = load(trained)
    expected, dtype = fixed_logits(policy.causal_lm), policy.causal_lm.dtype
    with writing_to(out, "--out"):
        saving.write_adapter(policy.model, saving.adapter_state(policy, keep=True), out)
        tokenizer.save_pretrained(out)
    del policy
    reopened = with_saved_adapters(load_causal_lm(trained.model, dtype, None), str(out))
    return compare(expected, fixed_logits(reopened), dtype)


def compare(expected: Tensor, exported: Tensor, dtype: torch.dtype) -> Gap:
    """Compare the logits of policy and export. Raises RuntimeError above the allowed difference."""
    from ..checkpoint.reopening import divergence
    from ..distributed.device import dtype_name

    difference = float((expected - exported).abs().max() / expected.abs().max())
    allowed = TOLERANCE[dtype_name(dtype)]
    if not difference <= allowed:
        raise RuntimeError(f"the exported model is not the trained one: its logits differ by {difference:.1e} of the "
                           f"largest, {allowed:.0e} would be rounding")  # fmt: skip
    return Gap(difference, allowed, divergence(expected, exported))


def upload(directory: Path, name: str) -> str:
    """Upload a directory to a repository of the hub and return its address. A new repository is private."""
    from huggingface_hub import HfApi

    hub = HfApi()
    address = hub.create_repo(name, private=True, exist_ok=True)
    hub.upload_folder(repo_id=name, folder_path=directory)
    return str(address)


def gguf_recipe(directory: Path) -> str:
    """A shell script that makes GGUF files of a merged model: in 16 bits, and quantised to about 4.5 bits."""
    model = shlex.quote(directory.resolve().name)
    return f"""#!/usr/bin/env bash
# GGUF files of the model in this directory, with llama.cpp's converter. Needs git, cmake, a C++ compiler and a network.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
llama_cpp=${{LLAMA_CPP:-../llama.cpp}}   # an existing checkout, or a place for a new one
[[ -d $llama_cpp ]] || git clone --depth 1 https://github.com/ggml-org/llama.cpp "$llama_cpp"
python -m venv "$llama_cpp/venv"
"$llama_cpp/venv/bin/pip" install -r "$llama_cpp/requirements/requirements-convert_hf_to_gguf.txt"
"$llama_cpp/venv/bin/python" "$llama_cpp/convert_hf_to_gguf.py" . --outtype f16 --outfile {model}-f16.gguf
cmake -S "$llama_cpp" -B "$llama_cpp/build" -DLLAMA_CURL=OFF
cmake --build "$llama_cpp/build" --target llama-quantize llama-cli -j
"$llama_cpp/build/bin/llama-quantize" {model}-f16.gguf {model}-q4_k_m.gguf Q4_K_M
echo "talk to it: $llama_cpp/build/bin/llama-cli -m {model}-q4_k_m.gguf"
"""


def usage(trained: Trained, out: Path, kind: str) -> list[str]:
    """Lines with commands to use an export with transformers, vLLM and llama.cpp."""
    from ..model.files import model_path

    place = shlex.quote(str(out))
    example = f"from transformers import pipeline; print(pipeline('text-generation', {str(out)!r})('Hello'))"
    example = shlex.quote(example) if re.search(r'["$`\\!]', example) else f'"{example}"'  # the shorter, if it works
    lines = [f"  transformers:        python -c {example}"]
    if kind == "adapter" and trained.model.quantization is not None:
        return [f"  It belongs on the base quantised to {trained.model.quantization}: docs/quantized.md loads both"]
    if kind == "adapter":
        assert trained.lora is not None
        rank = next((size for size in ADAPTER_RANKS if size >= trained.lora.r), trained.lora.r)
        return [*lines, f"  vLLM:                vllm serve {shlex.quote(model_path(trained.model))} --enable-lora "
                f"--max-lora-rank {rank} --lora-modules trained={place}"]  # fmt: skip
    lines += [f"  transformers serve:  transformers serve {place}", f"  vLLM:                vllm serve {place}"]
    return [*lines, f"  GGUF:                {place}/to_gguf.sh"] if kind == "gguf-recipe" else lines
