"""How much is decoded at once: what the device's memory has room for, and half of it where that was too much.

A completion is drawn with the noise of its own request, so what is in flight beside it changes the time alone.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from ..config.rollout import TokensInFlight
from ..types import Trajectory
from .engine import Decoder, Request
from .sampling import Sampling

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

log = logging.getLogger(__name__)

ON_CPU = 262_144
"""Tokens in flight on a device whose free memory is not asked for."""
RESERVE = 0.1
"""Share of a GPU's memory that `auto` leaves free: for the prefill, captured graphs, and fragments of the allocator."""
LOGIT_BYTES = 24
"""Bytes that drawing a token takes for each entry of the vocabulary, the logits among them."""


PAGE = 64
"""Tokens of a page of keys and values on a GPU."""
PREFILL_TOKENS = 16_384
"""Most tokens of prompts that a GPU computes in one row, but for a longer prompt."""


def pages_of(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE)


class BoundedDecoder(Decoder, Protocol):
    """A decoder that keeps the keys and values of at most so many tokens at once."""

    max_new_tokens: int
    max_tokens_in_flight: int


class WithinMemory:
    """A decoder that decodes as much at once as there is memory for."""

    def __init__(self, decoder: BoundedDecoder, tokens: TokensInFlight) -> None:
        """`tokens` is the most in flight; `auto` asks the device before each rollout."""
        self.decoder, self.tokens = decoder, tokens
        self.most: int | None = None  # half of what memory was too small for

    def decode(self, model: nn.Module, queue: deque[Request], sampling: Sampling) -> Iterator[list[Trajectory]]:
        """See `Decoder`. Where memory runs out, what is not finished is decoded again with half as much in flight.

        Raises torch.OutOfMemoryError where that is still too much, or a single sequence is.
        """
        least = max((len(request.prompt) for request in queue), default=0) + self.decoder.max_new_tokens
        self.decoder.max_tokens_in_flight = max(least, self._tokens(model))
        missing: dict[tuple[int, int], Request] = {}
        failure = None
        try:
            yield from self._attempt(model, queue, sampling, missing)
        except torch.OutOfMemoryError as error:
            in_flight = min(self.decoder.max_tokens_in_flight, self._needed(missing.values()))
            half = self.most = max(least, in_flight // 2)
            if half == in_flight:
                raise
            failure = str(error).partition("\n")[0]
        if failure is not None:  # out of the handler, whose traceback keeps what was allocated
            gc.collect()
            torch.cuda.empty_cache()
            log.warning("memory ran out in a rollout (%s): the %d completions that are missing are drawn with "
                        "rollout.max_tokens_in_flight: %d, half of what was in flight, and from now on never more",
                        failure, len(missing), half)  # fmt: skip
            self.decoder.max_tokens_in_flight = half
            queue.extendleft(reversed(missing.values()))
            yield from self._attempt(model, queue, sampling, missing)

    def release(self, places: Iterable[tuple[int, int]]) -> None:
        """See `Engine`."""
        self.decoder.release(places)

    def metrics(self) -> dict[str, float]:
        """See `Engine`."""
        return self.decoder.metrics()

    def _attempt(
        self, model: nn.Module, queue: deque[Request], sampling: Sampling, missing: dict[tuple[int, int], Request]
    ) -> Iterator[list[Trajectory]]:
        """Decode; `missing` are the requests that were taken and are not answered."""
        taken: deque[Request] = deque()

        def take() -> None:
            while queue:
                request = queue.popleft()
                missing[request.group, request.sample] = request
                taken.append(request)

        take()
        for ended in self.decoder.decode(model, taken, sampling):
            for each in ended:
                del missing[each.group, each.sample]
            yield ended
            take()

    def _tokens(self, model: nn.Module) -> int:
        tokens = self.tokens
        if tokens == "auto":
            device = next(model.parameters()).device
            tokens = ON_CPU
            if device.type == "cuda":
                tokens = fitting(free_bytes(device), *bytes_of(model), self.decoder.max_new_tokens)
        return tokens if self.most is None else min(tokens, self.most)

    def _needed(self, requests: Collection[Request]) -> int:
        """Tokens of requests at full length, a prompt counted once for its group."""
        prompts = sum(len(next(members).prompt) for _, members in groupby(requests, key=lambda request: request.group))
        return prompts + len(requests) * self.decoder.max_new_tokens


def fitting(free: int, token_bytes: int, row_bytes: int, row_tokens: int) -> int:
    """Tokens for which there is room in `free` bytes, where each takes `token_bytes` and each sequence, of at least
    `row_tokens`, another `row_bytes`."""
    return max(0, int(free / (token_bytes + row_bytes / row_tokens)))


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that a rollout may take: what nobody holds and what torch's allocator holds idle, less RESERVE."""
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + idle - RESERVE * total)


def bytes_of(model: nn.Module) -> tuple[int, int]:
    """Bytes of one token's keys and values in all layers, and of drawing one sequence's next token."""
    text = model.config.get_text_config()
    itemsize = next(model.parameters()).dtype.itemsize
    return text.num_hidden_layers * cache_width(text) * itemsize, text.vocab_size * LOGIT_BYTES


def cache_width(text: PreTrainedConfig) -> int:
    """Elements that a layer keeps of one token, keys and values, by a text model's config; 0 where it has no heads."""
    heads = getattr(text, "num_attention_heads", None) or 0  # none: a state of fixed size in place of a cache
    if getattr(text, "kv_lora_rank", None):  # latent attention, whose keys and values are kept as they are attended to
        return heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // max(heads, 1)
    return 2 * (getattr(text, "num_key_value_heads", None) or heads) * head_size
