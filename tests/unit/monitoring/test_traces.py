"""Traces: which completions have one, who wrote each token, and the numbers beside them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from grpo_dist.monitoring import traces
from grpo_dist.monitoring.lot import by_lot
from grpo_dist.monitoring.traces import trace_lines, traced_completions, traced_tokens, with_trace, writers
from grpo_dist.types import Batch, Prompt

pytestmark = pytest.mark.quick


def make_batch() -> Batch:
    """Three prompts with two completions each: three tokens, the middle one not sampled."""
    rows, sampled = 6, [True, False, True] * 6
    zeros = torch.zeros(rows, dtype=torch.float64)
    return Batch(
        [Prompt(index, [1], "") for index in (40, 41, 42)], torch.arange(rows) // 2, torch.full((rows,), 3),
        zeros == 0, torch.arange(18), torch.tensor(sampled), -torch.arange(12.0) / 10, zeros[:, None], zeros,
        advantages=torch.arange(12, dtype=torch.float64) - 5.5,
    )  # fmt: skip


def test_the_lot_falls_alike_at_every_step() -> None:
    everything = by_lot(range(100))
    assert sorted(everything) == list(range(100)) != everything
    assert by_lot([7, 3, 7, 50]) == [index for index in everything if index in (7, 3, 50)]


def test_the_prompts_that_come_first_by_lot_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    place = [40, 41, 42].index(by_lot([40, 41, 42])[0])
    assert traced_completions(batch) == range(2 * place, 2 * place + 2)
    assert traced_tokens(batch) == range(4 * place, 4 * place + 4)
    for most, number in ((6, 2), (5, 1), (3, 1)):
        monkeypatch.setattr(traces, "MOST_TOKENS", most)
        assert traced_completions(batch) == range(2 * place, 2 * place + number)
        assert traced_tokens(batch) == range(4 * place, 4 * place + 2 * number)
    monkeypatch.setattr(traces, "MOST_TOKENS", 2)
    assert len(traced_completions(batch)) == len(traced_tokens(batch)) == 0
    assert trace_lines(with_trace(batch), lambda ids: [], None) == [""] * 6


def test_a_trace_has_text_writer_and_numbers() -> None:
    batch = with_trace(make_batch())
    assert batch.trace is not None and batch.trace.isnan().all() and with_trace(batch) is batch
    batch.trace[:2] = torch.tensor([[0.25, 1.23456], [-1e-6, 2.0]], dtype=torch.float64)
    first = traced_completions(batch).start
    said = [json.dumps([{"role": "tool", "content": f"{3 * n + 1}"}]) for n in range(6)]
    lines = trace_lines(batch, lambda ids: [f"{number}" for number in ids], said)
    assert [n for n, line in enumerate(lines) if line] == [first, first + 1]
    logprobs = [-2 * first / 10, -(2 * first + 1) / 10]
    assert json.loads(lines[first]) == {
        "text": [f"{3 * first + n}" for n in range(3)], "by": "mtm", "logprob": logprobs, "gap": [0.25, -1e-6],
        "entropy": [1.23, 2.0], "advantage": [2 * first - 5.5, 2 * first - 4.5],
    }  # fmt: skip
    assert json.loads(lines[first + 1])["gap"] == [None, None]
    assert not any(trace_lines(replace(batch, trace=None), lambda ids: [], None))
    assert '"text": ["é", "é", "é"]' in trace_lines(batch, lambda ids: ["é"] * len(ids), None)[first]


def said(*answers: str) -> list[dict[str, str]]:
    """A conversation in which a tool gave these answers."""
    return [message for text in answers for message in ({"role": "assistant", "content": "42"},
                                                        {"role": "tool", "content": text})]  # fmt: skip


def test_who_wrote_what() -> None:
    texts = ["call", "<end>", "\nRes", "ult: ", "4", "2", "\nResult: 7", "7\n", "Answer:", "42"]
    sampled = [True, True, *[False] * 7, True]
    assert writers(texts, sampled, said("42", "77")) == "mmxxttttxm"
    assert writers(texts, sampled, said("nowhere", "42")) == "mmxxxxxxxm", "answers come in order"
    assert writers(texts, sampled, []) == "mmxxxxxxxm"
