"""Token by token: what the trainer computes for a few completions of a step, which the report shows first.

Shapes: W traced tokens, which are a range of the batch's T sampled tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from ..types import Batch
from .lot import by_lot

MOST_TOKENS = 2048
"""Most tokens of a step that are traced, sampled or not."""
MODEL, TOOL, TEMPLATE = "m", "t", "x"
"""Who wrote a token."""


def traced_completions(batch: Batch) -> range:
    """The completions that are traced: of the step's first prompt by lot, as many as fit into MOST_TOKENS."""
    indices = [prompt.index for prompt in batch.prompts]
    if not indices:
        return range(0)
    members = (batch.group == indices.index(by_lot(indices)[0])).nonzero()[:, 0]
    first, fitting = int(members[0]), int((torch.cumsum(batch.row_lengths[members], 0) <= MOST_TOKENS).sum())
    return range(first, first + fitting)


def traced_tokens(batch: Batch) -> range:
    """Their places in the batch's (T,) tensors."""
    chosen = traced_completions(batch)
    if not chosen:
        return range(0)
    return range(int(batch.starts[chosen[0]]), int(batch.starts[chosen[-1]] + batch.lengths[chosen[-1]]))


def with_trace(batch: Batch) -> Batch:
    """The batch with a trace of which nothing is known yet, unless it has one already."""
    if batch.trace is not None:
        return batch
    return replace(batch, trace=torch.full((len(traced_tokens(batch)), 2), torch.nan, dtype=torch.float64))


def trace_lines(
    batch: Batch, pieces_of: Callable[[Sequence[int]], list[str]], conversations: Sequence[str] | None
) -> list[str]:
    """For each of the N completions its trace as JSON, empty where it has none.

    A trace has lists: `text` of all tokens, `by` (who wrote each, a letter), and of the sampled ones `logprob` (the
    rollout's), `gap` (the trainer's minus the rollout's) and `entropy`, in nats, null where the trainer has computed no
    token, and `advantage`. `pieces_of` gives the texts of token ids, `conversations` the completions' messages as JSON.
    """
    lines = [""] * len(batch.lengths)
    if batch.trace is None:
        return lines
    assert batch.advantages is not None
    first = traced_tokens(batch).start
    for n in traced_completions(batch):
        start, row = int(batch.starts[n]), int(batch.row_starts[n])
        tokens, places = slice(start, start + int(batch.lengths[n])), slice(row, row + int(batch.row_lengths[n]))
        gap, entropy = batch.trace[tokens.start - first : tokens.stop - first].T.tolist()
        texts = pieces_of(batch.completion_ids(n))
        talk = json.loads(conversations[n]) if conversations else []
        lines[n] = json.dumps({
            "text": texts, "by": writers(texts, batch.sampled[places].tolist(), talk),
            "logprob": _rounded(batch.sampled_logprobs[tokens].tolist()), "gap": _rounded(gap),
            "entropy": _rounded(entropy), "advantage": _rounded(batch.advantages[tokens].tolist()),
        }, ensure_ascii=False)  # fmt: skip
    return lines


def writers(texts: Sequence[str], sampled: Sequence[bool], messages: Sequence[Mapping[str, Any]]) -> str:
    """Who wrote each token, a letter each: the model what was sampled; of the rest a tool what is in one of its
    `messages`, which come in order, and the template what is around them."""
    by, left = "", [message["content"] for message in messages if message["role"] != "assistant"]
    for is_sampled, tokens in groupby(zip(texts, sampled, strict=True), key=lambda each: each[1]):
        run = [text for text, _ in tokens]
        if is_sampled:
            by += MODEL * len(run)
            continue
        joined, at, spans = "".join(run), 0, []
        while left and (place := joined.find(left[0], at)) >= 0:
            at = place + len(left.pop(0))
            spans.append((place, at))
        ends = 0
        for text in run:
            begins, ends = ends, ends + len(text)
            by += TOOL if any(begins < last and ends > first for first, last in spans) else TEMPLATE
    return by


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.3g}") if not math.isnan(value) else None for value in values]
