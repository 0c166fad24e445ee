"""The Triton kernels compiled for a GPU, without one: registers, spills and shared memory of each, as JSON.

    python tests/unit/compiled_kernels.py 90          what models of today's sizes launch, for compute capability 9.0
    python tests/unit/compiled_kernels.py 90 all      more head sizes, groups, dtypes and vocabularies

The package's own functions launch the kernels, on tensors of a CPU, so that arguments, constants and options are those
of a run; a launch compiles and runs nothing. What the kernels compute is tested in Triton's interpreter, which takes
much that the compiler refuses (`rollout/test_triton.py`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CPU, HALF = torch.device("cpu"), torch.bfloat16
COMPILED: dict[str, dict[str, Any]] = {}
"""By the hash of what was compiled."""
CASE = [""]
plain = JITFunction.run


class Driver:
    """A driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return GPUTarget("cuda", int(sys.argv[1]), 32)


def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Compile what a launch would run."""
    assert all(0 < size < 65536 for size in grid[1:]), (grid, "only the first size of a grid may be larger")
    made = plain(kernel, *args, grid=grid, warmup=True, **options)
    if made.hash in COMPILED:
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)[0]
    code = "\n".join(line for line in made.asm["ptx"].splitlines() if re.match(r"\s+(@\S+ )?[a-z]", line))
    COMPILED[made.hash] = {
        "kernel": kernel.fn.__name__, "case": CASE[0], "registers": int(registers), "stack": int(stack),
        "shared": made.metadata.shared, "warps": made.metadata.num_warps,
        "float64": ".f64" in code, "tf32": "tf32" in code, "calls": "call" in code,
    }  # fmt: skip


driver.set_active(Driver())
JITFunction.run = run

from transformers import Gemma2Config, GptOssConfig, LlamaConfig, Qwen2Config, Qwen3Config  # noqa: E402
from transformers import Gemma2ForCausalLM as Gemma2  # noqa: E402
from transformers import GptOssForCausalLM as GptOss  # noqa: E402
from transformers import LlamaForCausalLM as Llama  # noqa: E402
from transformers import Qwen2ForCausalLM as Qwen2  # noqa: E402
from transformers import Qwen3ForCausalLM as Qwen3  # noqa: E402

from grpo_dist.model import attention, gate_kernel, head_kernel, join_kernel, rotation_kernel, triton_trial  # noqa: E402
from grpo_dist.model.layout import AttentionOptions  # noqa: E402
from grpo_dist.model.peft import PeftLoraConfig, with_new_adapters  # noqa: E402
from grpo_dist.rollout.native.cache import PrefillLayout  # noqa: E402
from grpo_dist.rollout.native.fused import FusedStep  # noqa: E402
from grpo_dist.rollout.native.fused_draw import fused_draw  # noqa: E402
from grpo_dist.rollout.native.pages import PagePool, two_rows  # noqa: E402
from grpo_dist.rollout.sampling import Rules, Sampling  # noqa: E402

BANS = {"banned": (3,), "min_new_tokens": 2}
SAMPLINGS = [Sampling(), Sampling(0.8, 0.9), Sampling(0.8, **BANS), Sampling(0.8, 0.9, 50, 0.01, **BANS)]


def of_draws(dtype: torch.dtype, vocabulary: int, samplings: list[Sampling]) -> None:
    """The draw of two rows."""
    for sampling in samplings:
        CASE[0] = f"{dtype}, {vocabulary} tokens, {sampling}"
        keys = torch.zeros(2, dtype=torch.int64)
        fused_draw(torch.empty((2, vocabulary), dtype=dtype), keys, keys, sampling, Rules(sampling, [5], CPU))


def of_updates(dtype: torch.dtype, size: int, vocabulary: int) -> None:
    """The head, the join of two parts of attention, the gate, the rotation."""
    CASE[0] = f"{dtype}, heads of {size}, {vocabulary} tokens"
    for slope_dtype in (None, dtype):
        logits = torch.empty((2, vocabulary))
        head_kernel.score_rows(logits, torch.zeros(2, dtype=torch.int64), 0.7, slope_dtype)
    parts, sums = (torch.empty((40, 3, size), dtype=dtype) for _ in range(2)), torch.empty((3, 40))
    join_kernel.join(next(parts), sums, next(parts), sums)
    gate = torch.empty((5, size * 10), dtype=dtype)
    for rank in (None, 16, 64):
        b = torch.empty((size * 10, rank or 0), dtype=dtype)
        adapters = None if rank is None else gate_kernel.Adapters(torch.empty((5, 2 * rank), dtype=dtype), b, b)
        gate_kernel.gated(gate, gate, adapters)
        gate_kernel.gated_backward(gate, gate, gate, adapters)
    rows = torch.empty((40, 3, size), dtype=dtype)
    for back in (False, True):
        rotation_kernel.rotate(rows, rows, rows[:, 0].contiguous(), rows[:, 0].contiguous(), back)


def pool_of(layers: int, key_heads: int, size: int, dtype: torch.dtype, prompt: int = 70) -> PagePool:
    """Two rows behind a prompt of so many tokens."""
    layout = PrefillLayout([prompt], CPU)
    layout.keys, layout.values = (
        {n: torch.zeros((key_heads, prompt, size), dtype=dtype) for n in range(layers)} for _ in range(2)
    )
    return two_rows(layout)


def of_attention(
    dtype: torch.dtype, group: int, size: int, window: int | None = None, cap: float | None = None,
    sinks: Tensor | None = None, splits: tuple[int, int] = (1, 1), prompt: int = 70,
) -> None:  # fmt: skip
    """Attention over pages."""
    CASE[0] = f"{dtype}, {group} heads of {size}, splits {splits}, cap {cap}, sinks {sinks is not None}"
    pool = pool_of(1, 1, size, dtype, prompt)
    pool.splits, pool.prompt_splits = splits
    pool.attend_rows(0, torch.empty((2, group, size), dtype=dtype), AttentionOptions(None, window, cap, sinks))


def of_steps(model_of: Any, config_of: Any, dtype: torch.dtype, rank: int, **shape: Any) -> None:
    """A step of a model with as many adapters as it has linear layers."""
    CASE[0] = f"{dtype}, {model_of.__name__}, {shape}, rank {rank}"
    config = config_of(**{"vocab_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0,
                          "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64} | shape)  # fmt: skip
    model = model_of._from_config(config, attn_implementation=attention.NAME, dtype=dtype).eval()
    if rank:
        adapters = PeftLoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear")
        model = with_new_adapters(model, adapters).base_model.model.to(dtype)
    pool = pool_of(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, dtype)
    pool.splits, pool.prompt_splits = 2, 4
    with torch.inference_mode():
        FusedStep(model)(torch.zeros(2, dtype=torch.int64), torch.full((2,), 70), pool)


def of_ones() -> None:
    """The trial at the start of a run, draws from one block, and prompts of one page. Triton compiles a kernel anew
    where an argument is 1: it is a constant then, which its interpreter does not know."""
    CASE[0] = "the trial"
    makers = {name: getattr(torch, name) for name in ("zeros", "ones", "full", "tensor")}
    with ExitStack() as patches:
        for name, plain_maker in makers.items():
            patches.enter_context(patch.object(torch, name, partial(_on_cpu, plain_maker)))
        obstacle = triton_trial.triton_obstacle.__wrapped__()
    # nothing has run, so that what is in memory by chance is no result
    assert obstacle is not None and obstacle.startswith("Triton's kernels compute"), obstacle
    of_draws(torch.float32, 64, [Sampling(0.8, 0.9, 1, 0.01, banned=(3,), min_new_tokens=1)])
    of_attention(HALF, 2, 16, prompt=7)


def _on_cpu(maker: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
    return maker(*args, **options)


def everything() -> None:
    """What is launched for more models."""
    for dtype in (HALF, torch.float16, torch.float32):
        for vocabulary in (32000, 50257, 151936, 262144):
            of_draws(dtype, vocabulary, SAMPLINGS)
        for size, vocabulary in ((64, 32000), (80, 50257), (256, 262144)):
            of_updates(dtype, size, vocabulary)
    for dtype in (HALF, torch.float32):
        for group, size in ((1, 64), (8, 64), (4, 80), (1, 96), (7, 128), (16, 128), (1, 256), (8, 256)):
            of_attention(dtype, group, size)
        of_attention(dtype, 2, 256, 68, 50.0)
        of_attention(dtype, 8, 64, 128, None, torch.zeros(8))
        of_steps(Qwen2, Qwen2Config, dtype, 0, hidden_size=896)
        for rank, hidden in ((8, 3584), (64, 1536), (16, 16384)):
            of_steps(Llama, LlamaConfig, dtype, rank, hidden_size=hidden, attention_bias=True, mlp_bias=True)
        of_steps(Gemma2, Gemma2Config, dtype, 16, hidden_size=3584, head_dim=256, num_hidden_layers=2)
        of_steps(GptOss, GptOssConfig, dtype, 16, hidden_size=2880, num_local_experts=2, num_experts_per_tok=1)
    of_attention(torch.float16, 6, 128, splits=(16, 16))


def main() -> None:
    """Compile everything."""
    of_draws(torch.float32, 151936, SAMPLINGS[3:])
    of_updates(HALF, 128, 151936)
    of_ones()
    of_steps(Qwen3, Qwen3Config, HALF, 16, hidden_size=1536, head_dim=128)
    if sys.argv[2:] == ["all"]:
        everything()
    print(json.dumps(list(COMPILED.values())))


if __name__ == "__main__":
    main()
