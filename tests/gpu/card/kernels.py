"""The ceilings of the card, and kernels by themselves: attention of packs and of pages, and the head."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from grpo_dist.model import logprobs
from grpo_dist.model.attention import RowLayout
from grpo_dist.model.block_attention import GPU_BLOCK, block_layout
from grpo_dist.model.layout import AttentionOptions

from .device import DEVICE, clear, milliseconds


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


@dataclass(frozen=True)
class Shape:
    """A step of `rows` rows, which share `prompts` prompts."""

    rows: int
    prompts: int
    heads: int
    key_heads: int
    size: int
    longest: int
    """Most tokens of a prompt."""
    most: int
    """Most tokens of a row behind its prompt."""


CHECKED = [Shape(3, 2, 4, 2, 64, 40, 30), Shape(9, 3, 12, 2, 128, 300, 500), Shape(20, 2, 14, 2, 64, 100, 70)]
TIMED = [
    Shape(512, 32, 12, 2, 128, 256, 512),
    Shape(512, 32, 12, 2, 128, 256, 1000),
    Shape(64, 8, 12, 2, 128, 256, 1000),
    Shape(8, 1, 12, 2, 128, 256, 1000),
    Shape(512, 32, 28, 4, 128, 256, 512),
]


def decode_attention(tiny: bool) -> dict[str, Any]:
    """The kernels of pages against float64, and how near a step's attention comes to the memory's speed."""
    figures: dict[str, Any] = {}
    checked, timed = (CHECKED[:1], []) if tiny else (CHECKED, TIMED)
    for place, shape in enumerate(checked):
        torch.manual_seed(place)
        lengths, own = (
            torch.randint(least, most + 1, (count,)).tolist()
            for least, most, count in ((1, shape.longest, shape.prompts), (0, shape.most, shape.rows))
        )
        figures[f"error, case {place}"] = round(FilledPages(shape, lengths, own).error(), 5)
    for shape in timed:
        pages = FilledPages(shape, [shape.longest] * shape.prompts, [shape.most] * shape.rows)
        figures[f"{shape.rows} rows x {shape.most}, {shape.heads} heads"] = pages.speed()
    return figures


class FilledPages:
    """Pages with random keys and values of prompts of these lengths, and of rows with so many tokens of their own."""

    def __init__(self, shape: Shape, lengths: list[int], own: list[int]) -> None:
        from grpo_dist.rollout.native.pages import PAGE, PagePool

        self.shape, self.lengths, self.own = shape, lengths, own
        rows, prompts, longest, most = shape.rows, shape.prompts, shape.longest, shape.most
        num_pages = rows * (most // PAGE + 2) + prompts * (longest // PAGE + 2)
        self.pool = PagePool(DEVICE, num_pages, rows, most + 1, longest)
        self.prompt_of = [n * prompts // rows for n in range(rows)]
        self.prompt_pages = self._store_prompts()
        self.row_pages = [self.pool.take(length + 1) for length in own]
        self._lay_tables()
        self.query = torch.randn(rows, shape.heads, shape.size, device=DEVICE).bfloat16()

    def _store_prompts(self) -> list[list[int]]:
        """The pages of each prompt. All others get random values too, which rows read as their own tokens."""
        from grpo_dist.rollout.native.cache import PrefillLayout

        layout = PrefillLayout(self.lengths, DEVICE)
        size = self.shape.key_heads, sum(self.lengths), self.shape.size
        layout.keys, layout.values = ({0: torch.randn(*size, device=DEVICE).bfloat16()} for _ in range(2))
        pages = [self.pool.take(length) for length in self.lengths]
        self.pool.store(layout, pages)
        for store in (self.pool.keys, self.pool.values):
            fresh = torch.randn_like(store[0])
            for each in pages:
                fresh[each] = store[0][each]
            store[0] = fresh
        return pages

    def _lay_tables(self) -> None:
        from grpo_dist.rollout.native.pages import TILE

        pool = self.pool
        for n, each in enumerate(self.prompt_pages):
            pool.prompt_table[n, : len(each)] = torch.tensor(each)
            pool.prompt_lengths[n] = self.lengths[n]
        for n, each in enumerate(self.row_pages):
            pool.table[n, : len(each)] = torch.tensor(each)
        pool.lengths[:] = torch.tensor(self.own)
        members = [[n for n, of in enumerate(self.prompt_of) if of == p] for p in range(len(self.lengths))]
        tiles = [(p, m[s : s + TILE]) for p, m in enumerate(members) for s in range(0, len(m), TILE)]
        pool.tile_prompt.fill_(-1)
        for n, (p, m) in enumerate(tiles):
            pool.tile_prompt[n] = p
            pool.tile_rows[n] = torch.tensor(m + [-1] * (TILE - len(m)))
        pool.begin_step(len(self.own), len(tiles))

    def attend(self) -> torch.Tensor:
        """Each row's query (rows, heads, size) over all of its keys."""
        return self.pool.attend_rows(0, self.query, AttentionOptions())

    def speed(self) -> dict[str, Any]:
        """The time of a step's attention, and what it has to read by that time."""
        nbytes = 2 * self.shape.key_heads * self.shape.size * 2 * (sum(self.own) + sum(self.lengths))
        time_ms = milliseconds(self.attend, 20)
        splits = [self.pool.splits, self.pool.prompt_splits]
        return {"ms": time_ms, "tb_per_s": round(nbytes / time_ms / 1e9, 2), "splits": splits}

    def error(self) -> float:
        """The largest error of a row, as a share of its output in float64."""
        output, worst = self.attend().double(), 0.0
        for n, query in enumerate(self.query.double()):
            keys, values = (self._seen(store[0], n) for store in (self.pool.keys, self.pool.values))
            weights = (torch.einsum("hd,hkd->hk", query, keys) * self.shape.size**-0.5).softmax(-1)
            expected = torch.einsum("hk,hkd->hd", weights, values)
            worst = max(worst, float((output[n] - expected).norm() / expected.norm()))
        return worst

    def _seen(self, store: torch.Tensor, row: int) -> torch.Tensor:
        """Keys or values of a row (heads, tokens, size): those of its prompt, then its own, the new one among them."""
        prompt = self.prompt_of[row]
        shared, mine = (
            store[pages].transpose(0, 1).flatten(1, 2)[:, :length]
            for pages, length in (
                (self.prompt_pages[prompt], self.lengths[prompt]),
                (self.row_pages[row], self.own[row] + 1),
            )
        )
        repeats = self.shape.heads // self.shape.key_heads
        return torch.cat([shared, mine], 1).double().repeat_interleave(repeats, 0)


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
        clear()
    logprobs.CHUNK_ELEMENTS = before
    return figures
