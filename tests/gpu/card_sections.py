"""The sections of `one_card.py`, which starts this in a process of its own."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    sys.path.append(str(Path(__file__).parents[1] / "unit"))
    import triton_interpreter

    triton_interpreter.mend()

from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_dist.config.rollout import RolloutConfig
from grpo_dist.config.schema import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from grpo_dist.distributed.device import set_up_cuda
from grpo_dist.model import attention, logprobs, packing
from grpo_dist.model.attention import RowLayout
from grpo_dist.model.block_attention import GPU_BLOCK, block_layout
from grpo_dist.model.layout import AttentionOptions
from grpo_dist.model.load import make_policy
from grpo_dist.planning.predict import Predictor
from grpo_dist.rollout import choose
from grpo_dist.rollout.engine import Request, decode_all, in_order
from grpo_dist.rollout.sampling import Sampling, draw
from grpo_dist.types import Batch, Prompt

SHAPES = {
    "0.5b": (896, 24, 14, 2, 4864, 151936),
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
    "7b": (3584, 28, 28, 4, 18944, 152064),
    "tiny": (64, 2, 4, 2, 128, 512),
}
"""Hidden, layers, heads, key heads, intermediate and vocabulary of Qwen2 models."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRACE = 15
"""Seconds after its deadline in which a section that waits for the device may still end by itself."""


class Overrun(Exception):
    """A section took longer than it may."""


@dataclass
class Report:
    """What was measured so far, in a file that is written after each section."""

    path: Path

    def sections(self) -> dict[str, Any]:
        """What is in the file."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def forget(self, names: list[str]) -> None:
        """Leave these sections out."""
        others = {name: figures for name, figures in self.sections().items() if name not in names}
        self.path.write_text(json.dumps(others, indent=1))

    def write(self, name: str, figures: dict[str, Any]) -> None:
        """Write the figures of a section."""
        self.path.write_text(json.dumps(self.sections() | {name: figures}, indent=1))

    def run(self, name: str, seconds: int, section: Callable[[], dict[str, Any]]) -> None:
        """Run a section and write its figures, or why there are none. A process that hangs ends itself."""

        def overrun(*_: object) -> None:
            raise Overrun(f"more than {seconds} s")

        self.write(name, {"failed": "its process ended"})
        begun = time.monotonic()
        signal.signal(signal.SIGALRM, overrun)
        signal.alarm(max(seconds, 1))
        faulthandler.dump_traceback_later(max(seconds, 1) + GRACE, exit=True)
        try:
            if seconds < 1:
                raise Overrun("the sections before it took all of the time")
            figures = section()
        except BaseException as error:  # the next section runs whatever happened to this one
            figures = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
        finally:
            signal.alarm(0)
        figures["seconds"] = round(time.monotonic() - begun, 1)
        self.write(name, figures)
        print(f"== {name}: {json.dumps(figures)}", flush=True)
        _clear()
        faulthandler.cancel_dump_traceback_later()


def _clear() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def milliseconds(function: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
    """Median time of a call, by device events."""
    for _ in range(warm_up):
        function()
    if DEVICE.type != "cuda":
        return -1.0
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 3)


@contextmanager
def kernels(figures: dict[str, Any], name: str) -> Iterator[None]:
    """Count the device's kernels inside, and how long it was busy."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    begun = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield
        torch.cuda.synchronize()
    wall = time.perf_counter() - begun
    events = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in events) / 1e6
    top = sorted(events, key=lambda e: -e.self_device_time_total)[:12]
    figures[name] = {
        "kernels": sum(e.count for e in events),
        "busy_ms": round(busy * 1e3, 2),
        "wall_ms": round(wall * 1e3, 2),
        "top": {e.key[:60]: [e.count, round(e.self_device_time_total / 1e3, 2)] for e in top},
    }


def model_of(shape: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """A Qwen2 of random weights, on the device."""
    hidden, layers, heads, key_heads, inner, vocabulary = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=shape != "7b",
        **options,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def adapted(shape: str, checkpointing: bool = False) -> Any:
    """A policy with adapters of rank 16 that add something, on the device."""
    policy = make_policy(model_of(shape), ModelConfig(name="none", gradient_checkpointing=checkpointing), LoraConfig())
    policy.fused_head = True
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    return policy.to(DEVICE)


# --- sections --------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The card, the versions, and the two ceilings."""
    import accelerate
    import transformers

    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }
    if DEVICE.type != "cuda":
        return figures
    import triton

    properties = torch.cuda.get_device_properties(0)
    figures |= {
        "triton": triton.__version__,
        "card": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
    pair = torch.empty((2, 4 << 30), dtype=torch.uint8, device=DEVICE)
    figures["copy_tb_per_s"] = round(pair.numel() / milliseconds(lambda: pair[1].copy_(pair[0])) / 1e9, 2)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    figures["product_tflops"] = round(2 * 8192**3 / milliseconds(lambda: a @ b, 10) / 1e9, 0)
    return figures


def pack_attention(tiny: bool) -> dict[str, Any]:
    """Two flash calls and a join against blocks in float64: error, then time beside the blocks."""
    figures: dict[str, Any] = {}
    torch.manual_seed(0)
    for pieces in ([(7, [3, 1, 9]), (1, [5])], [(130, [77, 200, 3]), (65, []), (300, [129])]):
        tokens = sum(p + sum(c) for p, c in pieces)
        truth = [torch.randn(1, h, tokens, 64, device=DEVICE, dtype=torch.float64).requires_grad_() for h in (6, 2, 2)]
        incoming = torch.randn(1, tokens, 6, 64, device=DEVICE, dtype=torch.float64)
        expected = block_layout(pieces).to(DEVICE).attend(0, *truth, AttentionOptions())
        expected_grads = torch.autograd.grad(expected, truth, incoming)
        for dtype in (torch.bfloat16, torch.float16):
            given = [x.detach().to(dtype).requires_grad_() for x in truth]
            output = RowLayout(pieces, DEVICE).attend(0, *given, AttentionOptions())
            grads = torch.autograd.grad(output, given, incoming.to(dtype))
            errors = [
                float((a.double() - b).norm() / b.norm())
                for a, b in zip([output, *grads], [expected, *expected_grads], strict=True)
            ]
            figures[f"error {len(pieces)} {dtype}"] = [round(e, 5) for e in errors]
    shapes = {
        "1 x (256 + 16 x 1000)": [(256, [1000] * 16)],
        "4 x (256 + 16 x 240)": [(256, [240] * 16)] * 4,
        "32 x (128 + 8 x 48)": [(128, [48] * 8)] * 32,
        "1 x (256 + 16 x 240)": [(256, [240] * 16)],
    }
    for name, pieces in [("tiny", [(9, [5, 6])])] if tiny else shapes.items():
        tokens = sum(p + sum(c) for p, c in pieces)
        given = [
            torch.randn(1, h, tokens, 128, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for h in (12, 2, 2)
        ]
        incoming = torch.randn(1, tokens, 12, 128, device=DEVICE, dtype=torch.bfloat16)
        layouts = {"flash": RowLayout(pieces, DEVICE), "blocks": block_layout(pieces, GPU_BLOCK).to(DEVICE)}
        for kind, layout in layouts.items():

            def forward(layout: Any = layout, given: list[torch.Tensor] = given) -> torch.Tensor:
                return layout.attend(0, *given, AttentionOptions())

            def both(given: list[torch.Tensor] = given, incoming: torch.Tensor = incoming) -> Any:
                return torch.autograd.grad(forward(), given, incoming)

            figures[f"{name}: {kind}"] = [milliseconds(forward), milliseconds(both)]
    return figures


def decode_attention(tiny: bool) -> dict[str, Any]:
    """The kernels of pages against float64, and how near a step's attention comes to the memory's speed."""
    from grpo_dist.rollout.native.cache import PrefillLayout
    from grpo_dist.rollout.native.pages import PAGE, TILE, PagePool

    figures: dict[str, Any] = {}
    cases = [(3, 2, 4, 2, 64, 40, 30), (9, 3, 12, 2, 128, 300, 500), (20, 2, 14, 2, 64, 100, 70)]
    cases = cases[:1] if tiny else cases
    timed = (
        []
        if tiny
        else [
            (512, 32, 12, 2, 128, 256, 512),
            (512, 32, 12, 2, 128, 256, 1000),
            (64, 8, 12, 2, 128, 256, 1000),
            (8, 1, 12, 2, 128, 256, 1000),
            (512, 32, 28, 4, 128, 256, 512),
        ]
    )
    for place, (rows, prompts, heads, key_heads, size, longest, most) in enumerate(cases + timed):
        torch.manual_seed(place)
        is_timed = place >= len(cases)
        lengths = [longest if is_timed else int(x) for x in torch.randint(1, longest + 1, (prompts,))]
        own = [most if is_timed else int(x) for x in torch.randint(0, most + 1, (rows,))]
        pool = PagePool(DEVICE, rows * (most // PAGE + 2) + prompts * (longest // PAGE + 2), rows, most + 1, longest)
        layout = PrefillLayout(lengths, DEVICE)
        total = sum(lengths)
        layout.keys, layout.values = (
            {0: torch.randn(key_heads, total, size, device=DEVICE).bfloat16()} for _ in range(2)
        )
        pages = [pool.take(n) for n in lengths]
        pool.store(layout, pages)
        for store in (pool.keys, pool.values):
            fresh = torch.randn_like(store[0])
            for each in pages:
                fresh[each] = store[0][each]
            store[0] = fresh
        for n, each in enumerate(pages):
            pool.prompt_table[n, : len(each)] = torch.tensor(each)
            pool.prompt_lengths[n] = lengths[n]
        prompt_of = [n * prompts // rows for n in range(rows)]
        row_pages = [pool.take(length + 1) for length in own]
        for n, each in enumerate(row_pages):
            pool.table[n, : len(each)] = torch.tensor(each)
        pool.lengths[:] = torch.tensor(own)
        members = [[n for n in range(rows) if prompt_of[n] == p] for p in range(prompts)]
        tiles = [(p, m[s : s + TILE]) for p, m in enumerate(members) for s in range(0, len(m), TILE)]
        pool.tile_prompt.fill_(-1)
        for n, (p, m) in enumerate(tiles):
            pool.tile_prompt[n] = p
            pool.tile_rows[n] = torch.tensor(m + [-1] * (TILE - len(m)))
        pool.begin_step(rows, len(tiles))
        query = torch.randn(rows, heads, size, device=DEVICE).bfloat16()
        if is_timed:
            nbytes = 2 * key_heads * size * 2 * (sum(own) + sum(lengths))
            time_ms = milliseconds(lambda: pool.attend_rows(0, query, AttentionOptions()), 20)  # noqa: B023
            figures[f"{rows} rows x {most}, {heads} heads"] = {
                "ms": time_ms,
                "tb_per_s": round(nbytes / time_ms / 1e9, 2),
                "splits": [pool.splits, pool.prompt_splits],
            }
            continue
        output = pool.attend_rows(0, query, AttentionOptions()).double()
        worst = 0.0
        for n in range(rows):
            parts = []
            for store in (pool.keys, pool.values):
                shared = store[0][pages[prompt_of[n]]].transpose(0, 1).flatten(1, 2)[:, : lengths[prompt_of[n]]]
                mine = store[0][row_pages[n]].transpose(0, 1).flatten(1, 2)[:, : own[n] + 1]
                parts.append(torch.cat([shared, mine], 1).double().repeat_interleave(heads // key_heads, 0))
            weights = (torch.einsum("hd,hkd->hk", query[n].double(), parts[0]) * size**-0.5).softmax(-1)
            expected = torch.einsum("hk,hkd->hd", weights, parts[1])
            worst = max(worst, float((output[n] - expected).norm() / expected.norm()))
        figures[f"error, case {place}"] = round(worst, 5)
    return figures


def fused_step(tiny: bool) -> dict[str, Any]:
    """The fused draw against the plain one, and completions of the engine on pages against the engine without them."""
    from grpo_dist.rollout.native.engine import NativeDecoder
    from grpo_dist.rollout.native.fused import FusedStep
    from grpo_dist.rollout.native.fused_draw import fused_draw
    from grpo_dist.rollout.native.gpu import DecodingOverPages
    from grpo_dist.rollout.native.steps import module_step

    figures: dict[str, Any] = {}
    steps = model_of("tiny" if tiny else "1.5b")
    figures["the step that a run takes"] = choose.own_step(steps, "fused")
    figures["off by"] = {name: round(choose._decoding_off(name, steps), 5) for name in ("operations", "pages", "fused")}
    del steps
    rows, vocabulary, positions = (2, 2048, 2) if tiny else (64, 151936, 64)
    logits = torch.randn(rows, vocabulary, device=DEVICE) * 3
    keys = torch.randint(-(2**62), 2**62, (rows,), device=DEVICE)
    tokens, plain = (
        torch.stack([each(logits, keys, torch.full_like(keys, n), Sampling())[0] for n in range(positions)])
        for each in (fused_draw, draw)
    )
    figures["draws that differ"] = f"{int((tokens != plain).sum())} of {tokens.numel()}"
    big = torch.randn(8 * rows, vocabulary, device=DEVICE).bfloat16()
    many = torch.randint(-(2**62), 2**62, (8 * rows,), device=DEVICE)
    figures["draw ms"] = {
        name: milliseconds(lambda: each(big, many, many, Sampling(top_p=top_p)))  # noqa: B023
        for name, each, top_p in (
            ("fused", fused_draw, 1.0),
            ("plain", draw, 1.0),
            ("fused top_p", fused_draw, 0.95),
            ("plain top_p", draw, 0.95),
        )
    }
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of("tiny", dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        requests = [
            Request(slot, n, list(range(3, 9 + 40 * slot)), key=97 * slot + n) for slot in range(3) for n in range(6)
        ]
        requests = requests[::5] if tiny else requests
        most = 4 if tiny else 150
        expected = decode_all(NativeDecoder([2, 5], most, 1 << 20, captures=False), model, requests)
        for step_of in (FusedStep, module_step):
            for captures in (False, True):
                with torch.inference_mode():
                    engine = NativeDecoder([2, 5], most, 1 << 12, step_of=step_of, captures=captures)
                    decoding = DecodingOverPages(engine, model, deque(requests), Sampling())
                    got = in_order(requests, chain.from_iterable(decoding.run()))
                same = sum(a.ids == b.ids for a, b in zip(got, expected, strict=True))
                gap = max(_gap_until_they_part(a, b) for a, b in zip(got, expected, strict=True))
                figures[f"{dtype} {step_of.__name__} captures {captures}"] = [same, len(got), round(gap, 6)]
    return figures


def _gap_until_they_part(one: Any, other: Any) -> float:
    """The largest gap between log-probabilities of two completions' tokens, as far as these are the same."""
    gap = 0.0
    for p, q, x, y in zip(one.logprobs, other.logprobs, one.ids, other.ids, strict=False):
        if x != y:
            break
        gap = max(gap, abs(p - q))
    return gap


def engines(shape: str, rows: int, prompt: int, new: int) -> dict[str, Any]:
    """The same work by this project's engine, by transformers' continuous batching, and by `generate`."""
    from grpo_dist.rollout import NativeDecoder, PagedDecoder
    from grpo_dist.rollout.choose import fused_step

    model, figures = model_of(shape), {}
    requests = [Request(n // 16, n, list(range(100, 100 + prompt)), key=n) for n in range(rows)]
    native = NativeDecoder([-1], new, 1 << 20, step_of=fused_step, pages=True)
    drawn = {}
    for name, engine in (("native", native), ("paged", PagedDecoder([-1], new, 1 << 20))):
        for turn in ("first", "second"):
            begun = time.perf_counter()
            drawn[name] = decode_all(engine, model, requests)
            figures[f"{name}, {turn}: tokens_per_s wall"] = round(rows * new / (time.perf_counter() - begun))
    same = sum(a.ids == b.ids for a, b in zip(*drawn.values(), strict=True))
    figures["same completions"] = f"{same} of {rows}"
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([requests[0].prompt] * rows, device=DEVICE)
    begun = time.perf_counter()
    with torch.no_grad():
        model.generate(ids, max_new_tokens=new // 4, min_new_tokens=new // 4, do_sample=True, pad_token_id=0)
    _clear()
    figures["generate: tokens_per_s wall"] = round(rows * (new // 4) / (time.perf_counter() - begun))
    return figures


def requests_for(count: int, prompt: int) -> list[Request]:
    """So many completions of 32 prompts of `prompt` tokens, or of one where there are fewer than 32."""
    ids = list(range(100, 100 + prompt))
    return [Request(n * 32 // count if count >= 32 else 0, n, ids, key=n) for n in range(count)]


def decode(shape: str, rows: list[int], prompt: int, new: int, tiny: bool) -> dict[str, Any]:
    """Whole rollouts with adapters apart, on pages, before and after kernels are compiled; and of a step halfway its
    milliseconds, its kernels and what it has to read."""
    from grpo_dist.rollout.native.engine import NativeDecoder
    from grpo_dist.rollout.native.fused import FusedStep
    from grpo_dist.rollout.native.gpu import DecodingOverPages

    model, figures = adapted(shape).causal_lm, {}
    engine = NativeDecoder([-1], new, 1 << 21, step_of=FusedStep)

    def made(requests: list[Request]) -> DecodingOverPages:
        return DecodingOverPages(engine, model, deque(requests), Sampling())

    for count in rows:
        requests = requests_for(count, prompt)
        entry: dict[str, Any] = {}
        with torch.inference_mode():
            for turn in ("first", "second")[: 1 if tiny else 2]:
                begun = time.perf_counter()
                with closing(made(requests)) as decoding:
                    list(decoding.run())
                wall = time.perf_counter() - begun
                entry[f"{turn}: tokens_per_s wall"] = round(count * new / wall)
            if count in (rows[0], rows[-1]):
                with closing(made(requests)) as decoding:
                    entry |= of_step(model, decoding, new // 2, len({request.slot for request in requests}) * prompt)
        if DEVICE.type == "cuda":
            entry["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        figures[f"{count} rows"] = entry
        del decoding
        _clear()
    return figures


def of_step(model: Any, decoding: Any, own: int, prompt_tokens: int) -> dict[str, Any]:
    """A step behind `own` tokens of each row."""
    decoding._take()
    decoding._admit()
    count = len(decoding.rows)
    decoding.pool.lengths[:count] = own
    for row in decoding.rows:
        row.length = own
    decoding._lay_tables()
    size = decoding.computed, decoding.tiles
    figures: dict[str, Any] = {}
    for _ in range(2):  # as it is, then watched for waits
        decoding.advance(*size)
    begun = time.perf_counter()
    decoding.advance(*size)
    figures["capture_ms wall"] = round((time.perf_counter() - begun) * 1e3, 1)
    figures["step_ms"] = milliseconds(lambda: decoding.advance(*size), 5)
    # weights once, and keys and values of each prompt and each row once
    embeddings, text = model.get_input_embeddings().weight, model.config
    read = [p for p in model.parameters() if p is not embeddings or text.tie_word_embeddings]
    token = 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * text.num_hidden_layers
    needed = 2 * (sum(p.numel() for p in read) + token * (prompt_tokens + count * (own + 1)))
    figures["needed_gb"] = round(needed / 1e9, 2)
    with kernels(figures, "profile of 2 steps"):
        decoding.advance(*size)
        decoding.advance(*size)
    return figures


def old_decode(shape: str, rows: list[int], prompt: int, new: int) -> dict[str, Any]:
    """The engine without pages, as it decodes models that pages cannot hold."""
    from grpo_dist.rollout.native.engine import NativeDecoder
    from grpo_dist.rollout.native.llama import LlamaStep

    model, figures = adapted(shape).causal_lm, {}
    for count in rows:
        requests = requests_for(count, prompt)
        begun = time.perf_counter()
        decode_all(NativeDecoder([-1], new, 1 << 21, step_of=LlamaStep), model, requests)
        wall = time.perf_counter() - begun
        figures[f"{count} rows"] = {
            "tokens_per_s wall": round(count * new / wall),
            "ms_a_token wall": round(wall / new * 1e3, 2),
        }
        _clear()
    return figures


def packs_of(name: str) -> list[tuple[int, list[int]]]:
    """Pieces of the packs that updates are timed on."""
    return {
        "4k: 1 x (256 + 16 x 240)": [(256, [240] * 16)],
        "16k: 4 x (256 + 16 x 240)": [(256, [240] * 16)] * 4,
        "16k: 1 x (256 + 16 x 1000)": [(256, [1000] * 16)],
        "8k: 2 x (256 + 16 x 240)": [(256, [240] * 16)] * 2,
        "tiny": [(9, [5, 6])],
    }[name]


def pack_of(pieces: list[tuple[int, list[int]]], vocabulary: int) -> packing.Pack:
    """A pack of random tokens."""
    lengths = torch.tensor([length for _, completions in pieces for length in completions])
    group = torch.tensor([n for n, (_, completions) in enumerate(pieces) for _ in completions])
    tokens = torch.randint(3, vocabulary, (int(lengths.sum()),))
    zeros = torch.zeros(len(lengths), dtype=torch.float64)
    prompts = [
        Prompt(n, torch.randint(3, vocabulary, (length,)).tolist(), "", None, {})
        for n, (length, _) in enumerate(pieces)
    ]
    batch = Batch(
        prompts, group, lengths, zeros > 0, tokens, tokens >= 0, torch.zeros(len(tokens)), zeros[:, None], zeros
    )
    place = iter(range(len(lengths)))
    return packing.make_pack(batch, [packing.Piece(n, [next(place) for _ in c]) for n, (_, c) in enumerate(pieces)])


def forward_and_backward(policy: Any, pack: packing.Pack) -> None:
    """A pack's part of an update."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        values, _, _ = policy(pack)
    values.mean().backward()


def update(shape: str, packs: list[str], checkpointing: bool) -> dict[str, Any]:
    """Forward and backward of packs under adapters: time, memory, kernels, share of the matrix units' peak."""
    policy, figures = adapted(shape, checkpointing).train(), {}
    hidden, layers, _, _, _, vocabulary = SHAPES[shape]
    parameters = sum(p.numel() for p in policy.parameters())
    for name in packs:
        pieces = packs_of(name)
        host = pack_of(pieces, vocabulary)
        tokens = len(host.ids)
        pairs = sum(p * p / 2 + sum(c * p + c * c / 2 for c in cs) for p, cs in pieces)
        # forward, and backward to the inputs alone: weights are frozen
        flops = 4 * parameters * tokens + 3.5 * 4 * pairs * hidden * layers
        pack = host.to(DEVICE)

        def both() -> None:
            forward_and_backward(policy, pack)  # noqa: B023

        entry: dict[str, Any] = {"ms": milliseconds(both, 3, 1)}
        if DEVICE.type == "cuda":
            entry["tokens_per_s"] = round(tokens / entry["ms"] * 1e3)
            entry["mfu_of_989"] = round(flops / entry["ms"] * 1e3 / 989e12, 3)
            entry["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            with kernels(entry, "profile"):
                both()
        figures[name] = entry
        policy.zero_grad(set_to_none=True)
        _clear()
    return figures


def memory(shape: str, name: str, checkpointing: bool) -> dict[str, Any]:
    """The peak of a pack's forward and backward, and what `python -m grpo_dist plan` predicts for it."""
    policy, pieces = adapted(shape, checkpointing).train(), packs_of(name)
    pack = pack_of(pieces, SHAPES[shape][5]).to(DEVICE)
    prompt, completions = pieces[0]
    config = Config(
        model=ModelConfig(name="none", gradient_checkpointing=checkpointing), lora=LoraConfig(),
        data=DataConfig(max_prompt_length=prompt),
        rollout=RolloutConfig(group_size=len(completions), max_completion_length=max(completions)),
        train=TrainConfig(batch_size=len(pieces), max_tokens_per_pack=len(pack.ids)),
    )  # fmt: skip
    parts = Predictor(config, policy.causal_lm.config, "gpu").parts(1, "DDP")
    predicted = sum(part.num_bytes for part in parts if part.phase in ("always", "update") and part.name != "optimizer")
    figures: dict[str, Any] = {"predicted_gib": round(predicted / 2**30, 4)}
    for _ in range(2):  # the first compiles kernels
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        policy.zero_grad(set_to_none=True)
        forward_and_backward(policy, pack)
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        figures |= {"peak_gib": round(peak / 2**30, 2), "predicted_of_peak": round(predicted / peak, 3)}
    return figures


def head(tiny: bool) -> dict[str, Any]:
    """The log-probability head, at several sizes of its chunks."""
    tokens, hidden, vocabulary = (64, 64, 512) if tiny else (15360, 1536, 151936)
    figures: dict[str, Any] = {}
    weight = torch.randn(vocabulary, hidden, device=DEVICE).bfloat16() * 0.02
    states = torch.randn(tokens, hidden, device=DEVICE).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
    before = dict(logprobs.CHUNK_ELEMENTS)
    for bits in (24, 26, 28, 29):
        logprobs.CHUNK_ELEMENTS = {"cpu": 1 << bits, "cuda": 1 << bits}

        def both() -> None:
            values, _ = logprobs.head_logprobs(states, weight, None, targets, 1.0)
            values.sum().backward()

        figures[f"2^{bits}"] = milliseconds(both, 3, 1)
        if DEVICE.type == "cuda":
            figures[f"2^{bits} peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        _clear()
    logprobs.CHUNK_ELEMENTS = before
    return figures


def end_to_end(tiny: bool) -> dict[str, Any]:
    """The quickstart's task in bfloat16: one process, then DDP and ZeRO-2 of one rank through the launcher."""
    figures: dict[str, Any] = {}
    steps = "1" if tiny else "12"
    launches = {"one process": [sys.executable, "-m", "grpo_dist.train"]}
    for name in ("ddp", "zero2"):
        launches[name] = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            f"accelerate_configs/{name}.yaml",
            "--num_processes",
            "1",
            "-m",
            "grpo_dist.train",
        ]
    for name, launch in launches.items():
        out = Path(f"/tmp/one_card/{name.replace(' ', '_')}")
        shutil.rmtree(out, ignore_errors=True)  # of a run before
        begun = time.perf_counter()
        done = subprocess.run(
            [
                *launch,
                "--config",
                "configs/quickstart.yaml",
                "--train.output_dir",
                str(out),
                "--train.num_train_steps",
                steps,
                "--train.resume",
                "never",
                "--logging.trackers",
                "[]",
            ],
            capture_output=True,
            text=True,
            timeout=600 if tiny else 100,
            check=False,
        )
        lines = (
            [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            if (out / "metrics.jsonl").exists()
            else []
        )
        log = done.stdout + done.stderr
        figures[name] = {
            "rc": done.returncode,
            "wall_s": round(time.perf_counter() - begun, 1),
            "rollouts": next((line[-300:] for line in log.splitlines() if "rollouts:" in line), ""),
            "rewards": [round(line["reward/mean"], 3) for line in lines if "reward/mean" in line],
            "gap": max((line.get("rollout/logprob_gap_max") or 0 for line in lines), default=None),
            "kl": max((line.get("rollout/kl") or 0 for line in lines), default=None),
            "update_share": next(
                (line["rollout/update_share"] for line in reversed(lines) if "rollout/update_share" in line), None
            ),
            "log": "" if done.returncode == 0 else log[-1500:],
        }
    return figures


def tests(tiny: bool) -> dict[str, Any]:
    """The tests of what a GPU alone runs."""
    names = ["test_packs.py"] if tiny else ["test_packs.py", "test_engine.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-o",
        "minversion=8",
    ]
    try:
        done = subprocess.run([*command, *(str(Path(__file__).with_name(name)) for name in names)], capture_output=True,
                              text=True, timeout=600 if tiny else 110, check=False)  # fmt: skip
        return {"rc": done.returncode, "end": done.stdout[-3000:]}
    except subprocess.TimeoutExpired as error:
        return {"failed": "overrun", "end": (error.stdout or b"")[-3000:].decode(errors="replace")}


Sections = dict[str, tuple[int, Callable[[], dict[str, Any]]]]


def sections_of(tiny: bool) -> Sections:
    """Each section's deadline in seconds, and what it does; what matters most is first."""
    small, large = ("tiny", "tiny") if tiny else ("1.5b", "7b")
    packs = ["16k: 4 x (256 + 16 x 240)", "16k: 1 x (256 + 16 x 1000)", "4k: 1 x (256 + 16 x 240)"]
    packs = ["tiny"] if tiny else packs
    pack = packs[0] if tiny else "8k: 2 x (256 + 16 x 240)"
    rows, prompt, new = ([2], 5, 6) if tiny else ([512, 64, 8], 256, 256)
    return {
        "machine": (30, machine),
        "fused step": (60, lambda: fused_step(tiny)),
        "rollout 1.5b of 1024": (75, lambda: decode(small, rows[:1], prompt, new if tiny else 1024, tiny)),
        "update 1.5b": (60, lambda: update(small, packs, False)),
        "update 7b": (60, lambda: update(large, [pack], False)),
        "memory 1.5b": (45, lambda: memory(small, packs[0], False)),
        "engines": (75, lambda: engines(small, 2 if tiny else 128, prompt, new if tiny else 128)),
        "memory 7b": (45, lambda: memory(large, pack, True)),
        "update 7b recomputed": (45, lambda: update(large, [pack], True)),
        "decode 7b": (60, lambda: decode(large, rows[:1] + rows[2:], prompt, new // 2, tiny)),
        "decode 1.5b": (60, lambda: decode(small, rows, prompt, new, tiny)),
        "pack attention": (45, lambda: pack_attention(tiny)),
        "decode attention": (45, lambda: decode_attention(tiny)),
        "end to end": (110, lambda: end_to_end(tiny)),
        "tests": (120, lambda: tests(tiny)),
        "head": (25, lambda: head(tiny)),
        "decode without pages": (40, lambda: old_decode(small, rows[:1] + rows[2:], prompt, new // 2)),
    }


def main(out: str, seconds: str, turn: str, *names: str) -> None:
    """Run all sections of these names, or those that have not begun."""
    end, tiny = time.monotonic() + float(seconds), "--tiny" in names
    set_up_cuda()
    if tiny:  # a program takes the interpreter 10 to 40 ms
        from grpo_dist.rollout.native import tables

        tables.LADDER[:] = [2, 4, 8]
    sections, report, patience = sections_of(tiny), Report(Path(out)), 10 if tiny else 1
    chosen = [name for name in names if name != "--tiny"] or list(sections)
    if unknown := set(chosen) - set(sections):
        sys.exit(f"--sections: {sorted(unknown)} given, expected some of {list(sections)}")
    if turn == "first":
        report.forget(chosen)
    for name in chosen:
        if name not in report.sections():
            limit, section = sections[name]
            report.run(name, min(limit * patience, int(end - time.monotonic())), section)


if __name__ == "__main__":
    main(*sys.argv[1:])
