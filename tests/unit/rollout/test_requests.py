"""Requests of an engine: lengths that they set, others that come meanwhile, and what a rollout leaves."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace

import pytest
from engine_pairs import ENDS, ENGINES, MOST, REQUESTS, Pair, assert_equal, drawn_by_rows, exactly, with_paged

from grpo_dist.model import attention
from grpo_dist.rollout import (
    Decoder,
    LoadedModel,
    LocalEngine,
    NativeDecoder,
    PagedDecoder,
    RowDecoder,
    Sampling,
    awake,
    decode_all,
    sample,
)
from grpo_dist.rollout.engine import in_order
from grpo_dist.types import Trajectory


@pytest.mark.parametrize("engine", [*ENGINES, RowDecoder(ENDS, MOST)])
def test_completions_of_given_lengths(engine: Decoder, pairs: dict[str, Pair]) -> None:
    pair, lengths = pairs["qwen2"], [1 + (7 * n) % MOST for n in range(len(REQUESTS))]
    requests = [exactly(request, length) for request, length in zip(REQUESTS, lengths, strict=True)]
    model = pair.plain if isinstance(engine, RowDecoder) else pair.shared
    completions = decode_all(engine, model, requests)
    assert [len(c.ids) for c in completions] == lengths
    assert not any(c.finished for c in completions)
    bounded = [replace(request, max_new_tokens=length) for request, length in zip(REQUESTS, lengths, strict=True)]
    free = drawn_by_rows(pair)
    for one, other in zip(completions, free, strict=True):
        shared = min(len(one.ids), len(other.ids))
        assert one.ids[:shared] == other.ids[:shared]
    for one, other, length in zip(decode_all(engine, model, bounded), free, lengths, strict=True):
        assert one.ids == other.ids[:length] and one.finished == (other.finished and len(other.ids) <= length)


@pytest.mark.parametrize("engine", [*ENGINES, RowDecoder(ENDS, MOST)])
def test_requests_that_come_while_others_are_decoded(engine: Decoder, pairs: dict[str, Pair]) -> None:
    """A longer prompt, another sample of a prompt that was asked for before, and one after everything has ended."""
    pair = pairs["qwen2"]
    model = pair.plain if isinstance(engine, RowDecoder) else pair.shared
    longer = replace(REQUESTS[0], group=90, prompt=[*REQUESTS[0].prompt, *range(20, 60)], key=7)
    expected = [*drawn_by_rows(pair), *decode_all(RowDecoder(ENDS, MOST), pair.plain, [longer])]
    queue = deque(REQUESTS[:3])
    later = deque([[longer, *REQUESTS[5:]], REQUESTS[3:5]])
    drawn: list[Trajectory] = []
    for ended in engine.decode(model, queue, Sampling()):
        drawn += ended
        if later:
            queue.extend(later.popleft())
    assert not later
    assert_equal(in_order([*REQUESTS, longer], drawn), expected)


def test_an_engine_is_a_service(pairs: dict[str, Pair]) -> None:
    engine = LocalEngine(NativeDecoder(ENDS, MOST, 200), LoadedModel(pairs["qwen2"].shared), {})
    expected = drawn_by_rows(pairs["qwen2"])
    with awake(engine):
        assert engine.poll() == []
        engine.submit(REQUESTS[:6], Sampling())
        drawn = engine.poll()
        with pytest.raises(ValueError, match=r"top_k=3.* given while requests with .*top_k=0"):
            engine.submit(REQUESTS[6:], Sampling(top_k=3))
        engine.submit(REQUESTS[6:], Sampling())
        while len(drawn) < len(REQUESTS):
            drawn += engine.poll()
        assert engine.poll() == []
        assert_equal(in_order(REQUESTS, drawn), expected)
        assert_equal(sample(engine, REQUESTS[:2], Sampling()), expected[:2])
        engine.submit(REQUESTS, Sampling())
        engine.poll()
    with awake(engine):  # what was under way is dropped
        assert engine.poll() == []
        assert_equal(sample(engine, REQUESTS, Sampling()), expected)
    with pytest.raises(AssertionError, match="sleeps"):
        engine.submit(REQUESTS, Sampling())


@with_paged
def test_an_interrupted_rollout_leaves_no_thread(pairs: dict[str, Pair]) -> None:
    class Stop(Exception):
        pass

    def check() -> None:
        raise Stop

    before, model = threading.active_count(), pairs["llama"].shared
    engine = LocalEngine(PagedDecoder(ENDS, MOST, 200), LoadedModel(model), {})
    with pytest.raises(Stop), awake(engine):
        sample(engine, REQUESTS, Sampling(), check=check)
    assert threading.active_count() == before
    assert pairs["llama"].shared.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("length", [0, MOST + 1, MOST + 2])
@pytest.mark.parametrize("engine", [*ENGINES, RowDecoder(ENDS, MOST)])
def test_lengths_that_cannot_be_had(engine: Decoder, length: int, pairs: dict[str, Pair]) -> None:
    requests = [replace(REQUESTS[0], max_new_tokens=length)]
    with pytest.raises(ValueError, match="max_new_tokens"):
        decode_all(engine, pairs["llama"].plain, requests)
