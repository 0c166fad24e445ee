"""The Triton kernels in Triton's interpreter, against plain torch; largest differences as JSON.

TRITON_INTERPRET=1 python tests/unit/rollout/interpreted_kernels.py          what a change is likely to break
TRITON_INTERPRET=1 python tests/unit/rollout/interpreted_kernels.py all      more rollouts and shapes
"""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import triton_interpreter

triton_interpreter.mend()

from interpreted_cases import cases  # noqa: E402

from grpo_dist.model import (  # noqa: E402
    gate_kernel,
    head_kernel,
    join_kernel,
    logprobs,
    rotation_kernel,
    shared_prefix,
)
from grpo_dist.model.layout import AttentionOptions  # noqa: E402
from grpo_dist.rollout.engine import Request, decode_all, in_order  # noqa: E402
from grpo_dist.rollout.native import draw_kernels, gpu, pages, tables  # noqa: E402
from grpo_dist.rollout.native import fused_draw as drawing  # noqa: E402
from grpo_dist.rollout.native.cache import PrefillLayout  # noqa: E402
from grpo_dist.rollout.native.engine import NativeDecoder  # noqa: E402
from grpo_dist.rollout.native.fused import FusedStep  # noqa: E402
from grpo_dist.rollout.native.fused_draw import fused_draw  # noqa: E402
from grpo_dist.rollout.native.pages import PAGE, TILE, PagePool  # noqa: E402
from grpo_dist.rollout.native.steps import module_step  # noqa: E402
from grpo_dist.rollout.sampling import Rules, Sampling, allowed, draw  # noqa: E402

CPU = torch.device("cpu")


def attention_of_pages(
    splits: tuple[int, int] | None, heads: int, key_heads: int, size: int, window: int | None = None,
    softcap: float | None = None, has_sinks: bool = False,
) -> float:  # fmt: skip
    """Rows of several prompts, over all of their pages, against a softmax over all of their keys."""
    torch.manual_seed(heads + size)
    prompts, rows = [70, 3, 130], [2, 0, 2, 1, 2, 2, 0, 2, 2, 2, 2, 2]
    own = [0, 5, 63, 64, 65, 130, 1, 2, 3, 7, 80, 127]
    pool = PagePool(CPU, 60, len(rows), 140, max(prompts))
    layout = PrefillLayout(prompts, CPU)
    layout.keys, layout.values = ({0: torch.randn(key_heads, sum(prompts), size)} for _ in range(2))
    prompt_pages = [pool.take(length) for length in prompts]
    pool.store(layout, prompt_pages)
    for n, (length, each) in enumerate(zip(prompts, prompt_pages, strict=True)):
        pool.prompt_table[n, : len(each)], pool.prompt_lengths[n] = torch.tensor(each), length
    for n, length in enumerate(own):
        each = pool.take(length + 1)
        pool.table[n, : len(each)], pool.lengths[n] = torch.tensor(each), length
        for store in (pool.keys, pool.values):
            store[0][each] = torch.randn(len(each), key_heads, PAGE, size)
    members = [[n for n, each in enumerate(rows) if each == prompt] for prompt in range(len(prompts))]
    tiles = [(n, of[at : at + TILE]) for n, of in enumerate(members) for at in range(0, len(of), TILE)]
    pool.tile_prompt.fill_(-1)
    for n, (prompt, of) in enumerate(tiles):
        pool.tile_prompt[n], pool.tile_rows[n] = prompt, torch.tensor(of + [-1] * (TILE - len(of)))
    pool.begin_step(len(rows), len(tiles) + 1)
    pool.splits, pool.prompt_splits = splits or (pool.splits, pool.prompt_splits)
    new = [torch.randn(1, count, len(rows), size) for count in (heads, key_heads, key_heads)]
    sinks = torch.randn(heads) + 1 if has_sinks else None
    output = pool.attend(0, *new, AttentionOptions(None, window, softcap, sinks))[0]
    worst = 0.0
    for n, prompt in enumerate(rows):
        seen = [
            _seen(store[0], prompt_pages[prompt], prompts[prompt], pool.table[n], own[n] + 1)
            for store in (pool.keys, pool.values)
        ]
        keys, values = (each.repeat_interleave(heads // key_heads, 0) for each in seen)
        scores = torch.einsum("hd,hkd->hk", new[0][0, :, n].double(), keys) * size**-0.5
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        scores[:, : 0 if window is None else max(0, scores.shape[1] - window)] = -torch.inf
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], 1)
        weights = scores.softmax(-1)[:, : keys.shape[1]]
        worst = max(worst, float((output[n] - torch.einsum("hk,hkd->hd", weights, values)).abs().max()))
    return worst


def _seen(store: Tensor, prompt: list[int], prompt_length: int, own: Tensor, own_length: int) -> Tensor:
    """Keys or values (Hk, K, D) of one row, in float64."""
    parts = [
        store[page].transpose(0, 1).flatten(1, 2)[:, :length]
        for page, length in ((torch.tensor(prompt), prompt_length), (own.long(), own_length))
    ]
    return torch.cat(parts, 1).double()


def completions(
    model: Any, step_of: Any, tokens: int, sampling: Sampling, members: int = 3, most: int = 6
) -> list[int]:
    """How many completions of the engine on pages are those of the engine without, how many are not, pages leaked."""
    requests = [
        Request(group, n, [6 + k % 17 for k in range(3 + 70 * group)], key=100 * group + n)
        for group in range(2)
        for n in range(members)
    ]
    with torch.inference_mode():
        engine = NativeDecoder([2, 5], most, tokens, step_of=step_of, captures=False)
        decoding = gpu.DecodingOverPages(engine, model, deque(requests), sampling)
        got = in_order(requests, [each for ended in decoding.run() for each in ended])
    expected = decode_all(NativeDecoder([2, 5], most, 1 << 20), model, requests, sampling)
    same = [
        a.ids == b.ids
        and a.finished == b.finished
        and all(abs(p - q) < 1e-5 for p, q in zip(a.logprobs, b.logprobs, strict=True))
        and (a.routes is b.routes is None or torch.equal(a.routes, b.routes))
        for a, b in zip(got, expected, strict=True)
    ]
    return [sum(same), len(same) - sum(same), decoding.pool.num_pages - len(set(decoding.pool.free))]


def turns(
    model: Any, tokens: int, answer: int, sampling: Sampling, members: tuple[int, ...] = (2, 1), most: int = 10
) -> list[int]:
    """How many rows of several turns are those of the engine without pages, how many are not, the turns, the prompts
    that were computed, and pages leaked. A row goes on as soon as it has ended, beside others that are drawn."""
    ends, computed, played = list(range(2, 12)), [], []
    plain = gpu.prefill
    for over_pages in (True, False):
        rows = {
            (group, n): Request(group, n, [6 + k % 17 for k in range(3 + 70 * group)], key=100 * group + n,
                               max_new_tokens=4, keeps=True)
            for group, count in enumerate(members) for n in range(count)
        }  # fmt: skip
        queue, drawn = deque(rows.values()), {place: [] for place in rows}
        step_of, room = (FusedStep, tokens) if over_pages else (module_step, 1 << 20)
        engine = NativeDecoder(ends, most, room, step_of=step_of, captures=False)
        with torch.inference_mode():
            if over_pages:
                gpu.prefill = lambda model, prompts: (computed.extend(prompts), plain(model, prompts))[1]
                decoding = gpu.DecodingOverPages(engine, model, queue, sampling)
                work = decoding.run()
            else:
                work = engine.decode(model, queue, sampling)
            for turn in (turn for ended in work for turn in ended):
                place = turn.group, turn.sample
                drawn[place].append(turn)
                asked, added = rows[place], [*turn.ids, *[7 + (sum(place) + n) % 16 for n in range(answer)]]
                offset = asked.offset + len(added)
                if not turn.finished or offset > most - 2:
                    engine.release([place])
                    continue
                rows[place] = replace(asked, prompt=asked.prompt + added, offset=offset, max_new_tokens=most - offset)
                queue.append(rows[place])
        gpu.prefill = plain
        played.append(drawn)
    same = [_same_turns(drawn, played[1][place]) for place, drawn in played[0].items()]
    leaked = decoding.pool.num_pages - len(set(decoding.pool.free)) + len(decoding.held)
    return [sum(same), len(same) - sum(same), sum(map(len, played[0].values())), len(computed), leaked]


def _same_turns(some: list[Any], others: list[Any]) -> bool:
    return (
        [each.ids for each in some] == [each.ids for each in others]
        and all(
            abs(p - q) < 1e-5
            for a, b in zip(some, others, strict=True)
            for p, q in zip(a.logprobs, b.logprobs, strict=True)
        )
        and all(
            a.routes is b.routes is None or torch.equal(a.routes, b.routes) for a, b in zip(some, others, strict=True)
        )
    )


def floors() -> int:
    """How many thresholds of truncated distributions leave other tokens than sorting does, with many equal logits."""
    wrong = 0
    for case in range(6):
        torch.manual_seed(case)
        logits = torch.randn(2, 90) * [0.1, 1, 3, 10][case % 4]
        logits = logits if case % 3 else (logits * 4).round() / 4
        logits[0, ::7] = -torch.inf
        sampling = Sampling(0.8, [0.9, 0.3, 1.0, 0.999][case // 2 % 4], [0, 0, 1, 20, 90][case % 5],
                            [0.0, 0.0, 0.05, 1.0][case // 3 % 4])  # fmt: skip
        peaks, totals, got = torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2)
        unused = logits, logits, 0
        draw_kernels.sum_blocks[2, 2](logits, got, peaks, totals, 90, 2, 0.8, *unused, BANS=False, FLOOR=False,
                                      BLOCK=64)  # fmt: skip
        draw_kernels.find_floors[(2,)](
            logits, peaks, got, 90, 2, 0.8, *unused, sampling.top_p, sampling.top_k,
            math.log(sampling.min_p) if sampling.min_p else -math.inf, PEAKS=2, BLOCK=64, WAYS=drawing.WAYS,
            PASSES=drawing.PASSES, BANS=False, TOP_K=sampling.top_k > 0, TOP_P=sampling.top_p < 1,
        )  # fmt: skip
        kept = allowed(logits / 0.8, sampling)
        expected = torch.ones_like(logits, dtype=torch.bool) if kept is None else kept
        possible = logits > -torch.inf
        wrong += int((((logits / 0.8 >= got[:, None]) & possible) != (expected & possible)).any(1).sum())
    return wrong


def main() -> None:
    """Run every kernel."""
    tables.LADDER[:], gpu.STEPS, drawing.BLOCK = [1, 2, 4, 8], 3, 32
    pages_of, rollouts, episodes = cases(sys.argv[1:] == ["all"])
    result: dict[str, Any] = {
        "attention": [attention_of_pages(*case) for case in pages_of],
        "completions": [completions(*case) for case in rollouts],
        "turns": [turns(*case) for case in episodes],
        "floors": floors(),
    }
    logits = peaked_logits()
    result |= draws(logits)
    result["head"] = scores(logits)
    result["update"] = [joined(), gates(), rotations()]
    result["two rows"] = two_rows()
    print(json.dumps(result))


def peaked_logits() -> Tensor:
    """Logits (5, 1003), with tokens that are drawn wherever they are not banned: 700 in the first row, 3 in all."""
    logits = torch.randn(5, 1003) * 3
    logits[:, 3] += 20
    logits[0, 700] += 150
    return logits


def draws(logits: Tensor) -> dict[str, Any]:
    """How many tokens the fused draw draws otherwise than the plain one, and the largest gap of log-probabilities; how
    many tokens it draws that are banned, and how many that are banned only early."""
    drawing.BLOCK = 256
    keys = torch.randint(-(2**62), 2**62, (5,))
    places = torch.tensor([0, 1, 2, 3, 1])
    bans = {"banned": (700,), "min_new_tokens": 2}
    samplings = [Sampling(0.8), Sampling(), Sampling(), Sampling(0.8, 0.7, 50, 0.001), Sampling(0.8, **bans),
                 Sampling(0.8, 0.7, **bans), Sampling(1.0, 0.9, 20, 0.01, banned=(3, 700))]  # fmt: skip
    # truncated draws take long: of two rows only, one of which may not end yet
    rows = [[0, 2] if sampling.top_p < 1 else list(range(5)) for sampling in samplings]
    drawn = [[each(logits[of], keys[of], places[of] + n, sampling, Rules(sampling, [3, 11], CPU)) for n, sampling, of in
              zip((0, 1, 2, 3, 0, 0, 4), samplings, rows, strict=True)] for each in (fused_draw, draw)]  # fmt: skip
    banning = [(drawn[0][n][0], places[rows[n]]) for n in (4, 5)]
    pairs = list(zip(*drawn, strict=True))
    return {
        "banned": sum(int(((tokens == 700) | ((tokens == 3) & (at < 2))).sum()) for tokens, at in banning),
        "early": sum(int((tokens == 3).sum()) for tokens, _ in banning),
        "draws": [
            sum(int((a[0] != b[0]).sum()) for a, b in pairs),
            max(float((a[1] - b[1]).abs().max()) for a, b in pairs),
        ],
    }


def scores(logits: Tensor) -> float:
    """What the head returns for logits, at two temperatures."""
    head_kernel.BLOCK = 256
    targets = torch.randint(0, 1003, (5,))
    pairs = [
        (a, b)
        for temperature in (1.0, 0.7)
        for a, b in zip(
            head_kernel.score_rows(logits[:, :1003].contiguous(), targets, temperature, torch.float32),
            logprobs._scored(logits[:, :1003], targets, temperature, torch.float32),
            strict=True,
        )
    ]
    return max(float((a - b).abs().max()) for a, b in pairs)


def joined() -> float:
    """The join of two parts of attention, of which some rows have nothing in the second one."""
    parts = [torch.randn(37, 3, 24) for _ in range(2)]
    sums = [torch.randn(3, 37) * 3 for _ in range(2)]
    sums[1][:, ::5] = torch.inf
    sums[1][:, 1::5] = -torch.inf
    expected = shared_prefix._joined(parts[0].clone(), sums[0].clone(), parts[1], sums[1])
    got = join_kernel.join(parts[0], sums[0], parts[1], sums[1])
    return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))


def gates() -> float:
    """SwiGLU's gate and its gradients, without adapters and with some of more ranks than are added at once."""
    worst = 0.0
    for rank in (None, 19):
        gate, up, grad = torch.randn(5, 333) * 4, torch.randn(5, 333), torch.randn(5, 333)
        adapters, inputs = None, [gate.clone(), up.clone()]
        if rank is not None:
            adapters = gate_kernel.Adapters(torch.randn(5, 2 * rank), *(torch.randn(333, rank) * 0.1 for _ in range(2)))
            for x, low, b in zip(inputs, adapters.low.chunk(2, 1), adapters[1:], strict=True):
                x += low @ b.T
        inputs = [x.requires_grad_() for x in inputs]
        output = torch.nn.functional.silu(inputs[0]) * inputs[1]
        expected = [output, *torch.autograd.grad(output, inputs, grad)]
        got = [gate_kernel.gated(gate, up, adapters), *gate_kernel.gated_backward(grad, gate, up, adapters)]
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in zip(got, expected, strict=True)))
    return worst


def rotations() -> float:
    """Heads in their positions, and the gradients by the heads before."""
    query, key = ((torch.randn(19, heads, 12)).requires_grad_() for heads in (6, 2))
    cos, sin, *grads = (torch.randn(19, *shape) for shape in ((12,), (12,), (6, 12), (2, 12)))
    outputs = [x * cos[:, None] + torch.cat([-x[..., 6:], x[..., :6]], -1) * sin[:, None] for x in (query, key)]
    expected = [*outputs, *torch.autograd.grad(outputs, (query, key), grads)]
    got = [*rotation_kernel.rotate(query.detach(), key.detach(), cos, sin),
           *rotation_kernel.rotate(*grads, cos, sin, back=True)]  # fmt: skip
    return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))


def two_rows() -> float:
    """The two rows of a prompt with which a model's decoding is tried, against a softmax over all of their keys."""
    layout = PrefillLayout([5], CPU)
    prompt = [torch.randn(2, 5, 16) for _ in range(2)]
    layout.keys, layout.values = ({0: each.clone()} for each in prompt)
    query, *new = (torch.randn(1, heads, 2, 16) for heads in (4, 2, 2))
    output = pages.two_rows(layout).attend(0, query, *new, AttentionOptions())[0]
    worst = 0.0
    for n in range(2):
        keys, values = (
            torch.cat([shared, own[0, :, n, None]], 1).repeat_interleave(2, 0)
            for shared, own in zip(prompt, new, strict=True)
        )
        weights = (torch.einsum("hd,hkd->hk", query[0, :, n], keys) * 16**-0.5).softmax(-1)
        worst = max(worst, float((output[n] - torch.einsum("hk,hkd->hd", weights, values)).abs().max()))
    return worst


if __name__ == "__main__":
    main()
