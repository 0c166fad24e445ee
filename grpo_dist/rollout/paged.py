"""The paged decoder: transformers' continuous batching computes, and this project's sampling draws.

Each token is a function of its completion's key and its place, as in every other engine, so the same completions come
of it. Tokens and log-probabilities are written to tables on the device as they are drawn, which costs no waiting; what
transformers is handed back is a row of scores in which only the drawn token stands out.

Shapes: N requests, R sequences in a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from ..types import Trajectory
from .engine import NOBODY, Decoder, Request, columns_of, limit_of, trajectory
from .sampling import Rules, Sampling, draw

try:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
        ContinuousBatchingLogitsProcessorList,
    )
except ImportError:  # older transformers; see `paged_obstacle`
    ContinuousBatchingConfig = ContinuousBatchingManager = ContinuousBatchingLogitsProcessorList = None
    ContinuousBatchingLogitsProcessor = object

PAGE_TOKENS = {"cpu": 32, "cuda": 256}
"""Tokens of a page of the cache; flash kernels want 256, and without one smaller pages waste less."""
BATCH_TOKENS = 2048
"""Most tokens computed at once; longer prompts come in parts."""
SECONDS_BETWEEN_CHECKS = 0.1


def paged_obstacle() -> str | None:
    """Why transformers' continuous batching cannot be used here, None where it can."""
    # managers that can be destroyed came together with logits processors that see new tokens alone
    if hasattr(ContinuousBatchingManager, "destroy"):
        return None
    given = transformers.__version__
    return f"transformers {given} has no continuous batching that another sampler can draw for; 5.12 has"


class PagedDecoder(Decoder):
    """Decodes with transformers' paged cache, for every model that its continuous batching takes."""

    def __init__(self, end_ids: list[int], max_new_tokens: int, max_tokens_in_flight: int) -> None:
        self.end_ids, self.max_new_tokens = end_ids, max_new_tokens
        self.max_tokens_in_flight = max_tokens_in_flight

    @torch.no_grad()
    def decode(self, model: nn.Module, queue: deque[Request], sampling: Sampling) -> Iterator[list[Trajectory]]:
        """See `Decoder`; requests that are appended wait until those before them are answered.

        A list comes only where something has moved, so that a hang can be told from work. Raises RuntimeError where
        transformers fails, or is too old.
        """
        if obstacle := paged_obstacle():
            raise RuntimeError(obstacle)
        attention = model.config._attn_implementation
        while queue:
            requests = list(queue)
            queue.clear()
            # on a GPU transformers takes a flash kernel in its place where it finds one
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
            try:
                yield from self._decode(model, requests, sampling)
            finally:
                model.set_attn_implementation(attention)

    def _decode(self, model: nn.Module, requests: list[Request], sampling: Sampling) -> Iterator[list[Trajectory]]:
        limits = [limit_of(request, self.max_new_tokens) for request in requests]
        drawing = _Drawing(requests, sampling, self.end_ids, self.max_new_tokens, model.device)
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, max_new_tokens=self.max_new_tokens, eos_token_id=-1),
            self._settings(requests, model.device.type),
        )
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([drawing]))
        manager.logit_processor.tensors_required = 1
        done, seen = 0, -1
        manager.start()
        try:
            for n, request in enumerate(requests):
                manager.add_request(
                    request.prompt, str(n), limits[n], eos_token_id=[] if request.ignore_end else self.end_ids
                )  # fmt: skip
            while done < len(requests):
                if drawing.batches != seen:
                    seen = drawing.batches
                    yield []
                answer = manager.get_result(timeout=SECONDS_BETWEEN_CHECKS)
                if answer is None:
                    _require_running(manager)
                    continue
                if answer.error is not None:
                    raise RuntimeError(f"transformers' continuous batching: {answer.error}")
                done += 1
                n = int(answer.request_id)
                yield [self._trajectory(requests[n], answer.generated_tokens, drawing, n)]
        finally:
            manager.stop(hard_stop=done < len(requests))
            manager.destroy()

    def _settings(self, requests: list[Request], device: str) -> ContinuousBatchingConfig:
        page = PAGE_TOKENS.get(device, PAGE_TOKENS["cuda"])
        pages = [math.ceil((len(request.prompt) + self.max_new_tokens) / page) for request in requests]
        most = max(self.max_tokens_in_flight // page, max(pages))
        names = {field.name for field in fields(ContinuousBatchingConfig)}
        size = "page_size" if "page_size" in names else "block_size"  # as transformers calls a page before 5.18
        # not asynchronous: there, a token may be drawn that is thrown away and has to be drawn again
        return ContinuousBatchingConfig(**{size: page}, num_blocks=min(sum(pages), most) + 1,
                                        max_batch_tokens=BATCH_TOKENS, use_async_batching=False)  # fmt: skip

    def _trajectory(self, request: Request, ids: list[int], drawing: _Drawing, n: int) -> Trajectory:
        if drawing.tokens[n, : len(ids)].tolist() != ids:
            raise RuntimeError("transformers' continuous batching returned other tokens than were drawn")
        ids = ids[: int(drawing.stopped_at[n]) or None]
        return trajectory(request, ids, drawing.logprobs[n, : len(ids)].tolist(), self.end_ids, drawing.sampling)


def _require_running(manager: ContinuousBatchingManager) -> None:
    if manager.is_running():
        return
    fatal = manager.background_thread_status.fatal_error
    if isinstance(fatal, torch.OutOfMemoryError):
        raise fatal
    raise RuntimeError("transformers' continuous batching ended before its requests") from fatal


class _Drawing(ContinuousBatchingLogitsProcessor):
    """Draws the next token of each sequence in place of transformers."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(
        self, requests: list[Request], sampling: Sampling, end_ids: list[int], most: int, device: torch.device
    ) -> None:
        self.sampling, self.nobody = sampling, len(requests)  # rows that get no token draw for nobody
        self.rules, self.end_id = Rules(sampling, end_ids, device), end_ids[0]
        self.rules.grow(len(requests) + 1)
        # transformers knows no other ends than ids: what a stop string ends gets one more token, which does
        self.stopped_at = torch.zeros(len(requests) + 1, dtype=torch.int64, device=device)
        self.batches = self.widest = 0
        self.keys, _, self.offsets, self.may_end = columns_of([*requests, NOBODY], most, device)
        self.lengths = torch.zeros(len(requests) + 1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros((len(requests) + 1, most + 1), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((len(requests) + 1, most + 1), device=device)

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """See transformers."""
        int32_tensor.fill_(self.nobody)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """The place of each row's request."""
        places = [self._place(each.state.request_id) for each in requests_with_new_token]
        self.batches, self.widest = self.batches + 1, max(self.widest, len(places))
        # transformers keeps what earlier batches left behind these
        return torch.tensor(places + [self.nobody] * (self.widest - len(places)), dtype=torch.int32)

    def _place(self, request_id: str) -> int:
        return int(request_id) if request_id.isdecimal() else self.nobody  # others are made up to warm up

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Draw from logits (R, V), and return scores (R, V) of which the drawn token's is the largest."""
        request = tensor_arg[: scores.shape[0]].long()
        position = self.lengths[request].clamp(max=self.tokens.shape[1] - 1)
        place = self.offsets[request] + position
        token, logprob = draw(scores, self.keys[request], place, self.sampling, self.rules)
        if self.sampling.stop is not None:
            has_stopped = self.stopped_at[request] > 0
            token = torch.where(has_stopped, self.end_id, token)
            stops = self.rules.ended(token, request, place) & self.may_end[request] & ~has_stopped
            self.stopped_at[request] = torch.where(stops, position + 1, self.stopped_at[request])
        self.tokens[request, position] = token
        self.logprobs[request, position] = logprob
        self.lengths[request] = position + 1
        return torch.zeros_like(scores).scatter_(1, token[:, None], 1.0)
