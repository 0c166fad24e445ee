"""Rollouts: the fused step and its draw, whole decodings, and other engines beside this one."""

from __future__ import annotations

import time
from collections import deque
from contextlib import closing
from itertools import chain
from typing import Any

import torch

from grpo_dist.rollout import choose
from grpo_dist.rollout.engine import Request, decode_all, in_order
from grpo_dist.rollout.sampling import Sampling, draw

from .device import DEVICE, clear, milliseconds, profiled
from .models import adapted, model_of


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
            Request(group, n, list(range(3, 9 + 40 * group)), key=97 * group + n)
            for group in range(3)
            for n in range(6)
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
    clear()
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
                    entry |= of_step(model, decoding, new // 2, len({request.group for request in requests}) * prompt)
        if DEVICE.type == "cuda":
            entry["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        figures[f"{count} rows"] = entry
        del decoding
        clear()
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
    with profiled(figures, "profile of 2 steps"):
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
        clear()
    return figures
