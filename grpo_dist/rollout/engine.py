"""What a training asks of an engine, and an engine in this process of its decoder."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn

from ..distributed.transfer import to_device
from ..types import Trajectory, integers
from .sampling import Sampling

PLAIN = Sampling()
"""Draws from the model's distribution as it is."""


@dataclass(frozen=True)
class Request:
    """One trajectory to sample."""

    group: int
    """The prompt's place in the step's batch, as in `Batch.group`."""
    sample: int
    """The trajectory's place in its group."""
    prompt: list[int]
    """Token ids of the prompt."""
    key: int
    """Key of its noise, see hashing.stream_key."""
    prompt_key: int = 0
    """Key of the noise of what an environment draws: the same for all samples of a prompt."""
    max_new_tokens: int | None = None
    """The most tokens to sample, where it is less than the engine's own limit."""
    offset: int = 0
    """Tokens of the trajectory that come before: the noise of a token goes by its place in the trajectory."""
    keeps: bool = False
    """Whether the row stays in memory once the trajectory has ended by itself, until a request of the same group and
    sample goes on with it or the row is released. Engines that cannot keep it compute it again."""
    ignore_end: bool = False
    """Sample on after a token that ends a completion, as a benchmark does that repeats another trainer's work."""


NOBODY = Request(group=0, sample=0, prompt=[], key=0)
"""The request of rows without one."""


class Engine(Protocol):
    """A service that samples trajectories with the policy's weights; requests may be submitted at any time."""

    decoding: dict[str, str | None]
    """What a checkpoint keeps of the engine: with another one the rest of a run would round otherwise."""
    is_elsewhere: bool
    """Whether it samples in other processes. Then this one may update the policy while another thread polls it."""

    def update_weights(self, check: Callable[[], None] = lambda: None) -> None:
        """Take over the policy's weights as they are now; a collective. `check` may be called meanwhile; it raises
        Interrupted where the run is to stop, and then all ranks do."""

    def wake(self) -> None:
        """Get ready to sample; a collective."""

    def sleep(self) -> None:
        """Drop what was submitted, and give back the memory that only sampling needs; a collective."""

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        """Ask for a trajectory a request. Raises ValueError where requests that wait are sampled in another way."""

    def release(self, places: Iterable[tuple[int, int]]) -> None:
        """Drop the rows, by group and sample, that were kept and with which no request goes on."""

    def poll(self) -> list[Trajectory]:
        """Work on for a while, and return the trajectories that ended; none where nothing was submitted."""

    def update_share(self) -> float | None:
        """Share of the adapters' update that is in the weights which sample; None where there is none. A collective."""

    def metrics(self) -> dict[str, float]:
        """Metrics of the engine itself since the last call."""

    def close(self) -> None:
        """End what the engine has started outside of this process."""


class Decoder(Protocol):
    """Decodes in this process."""

    def decode(self, model: nn.Module, queue: deque[Request], sampling: Sampling) -> Iterator[list[Trajectory]]:
        """The trajectories that end between two looks at the queue, in lists that are often empty.

        It takes requests from the left of `queue` and ends when there are none and all it took are answered. Requests
        may be appended while it is suspended.
        """

    def release(self, places: Iterable[tuple[int, int]]) -> None:
        """See `Engine`; nothing to do for a decoder that keeps no rows."""
        return

    def metrics(self) -> dict[str, float]:
        """See `Engine`."""
        return {}


@contextmanager
def awake(engine: Engine) -> Iterator[None]:
    """Inside, the engine takes requests; a collective."""
    engine.wake()
    try:
        yield
    finally:
        engine.sleep()


def sample(
    engine: Engine, requests: list[Request], sampling: Sampling,
    on_finish: Callable[[list[Trajectory]], None] | None = None, check: Callable[[], None] | None = None,
) -> list[Trajectory]:  # fmt: skip
    """One trajectory a request of an engine that is awake, in the order of the requests.

    `on_finish` is given trajectories as they end; `check` is called as the work moves and may raise to give up.
    """
    engine.submit(requests, sampling)
    done: list[Trajectory] = []
    while len(done) < len(requests):
        ended = engine.poll()
        if check:
            check()
        if on_finish and ended:
            on_finish(ended)
        done += ended
    return in_order(requests, done)


def decode_all(
    decoder: Decoder, model: nn.Module, requests: list[Request], sampling: Sampling = PLAIN
) -> list[Trajectory]:
    """One trajectory a request of a decoder by itself, in the order of the requests."""
    return in_order(requests, chain.from_iterable(decoder.decode(model, deque(requests), sampling)))


def in_order(requests: list[Request], trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """Each request's trajectory."""
    answers = {(each.group, each.sample): each for each in trajectories}
    return [answers[request.group, request.sample] for request in requests]


def take_group(queue: deque[Request]) -> list[Request]:
    """The first request of a queue, and those behind it that share its prompt."""
    first = queue.popleft()
    requests = [first]
    while queue and (queue[0].group, queue[0].prompt) == (first.group, first.prompt):
        requests.append(queue.popleft())
    return requests


def limit_of(request: Request, most: int) -> int:
    """The most tokens to sample for a request of an engine whose limit is `most`; ValueError for none or more."""
    limit = most if request.max_new_tokens is None else request.max_new_tokens
    if not 1 <= limit <= most:
        raise ValueError(f"max_new_tokens: {limit} given, expected 1 to {most}")
    return limit


def columns_of(requests: Sequence[Request], most: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a step needs of N requests of an engine whose limit is `most`, each (N,) on the device: the keys of their
    noise, the most tokens to sample, the tokens before these (int64), and whether an end token ends them (bool)."""
    rows = [(each.key, limit_of(each, most), each.offset) for each in requests]
    ends = torch.tensor([not each.ignore_end for each in requests])
    keys, limits, offsets, may_end = to_device([*map(integers, zip(*rows, strict=True)), ends], device)
    return keys, limits, offsets, may_end


def trajectory(
    request: Request, ids: list[int], logprobs: list[float], end_ids: list[int], sampling: Sampling,
    routes: Tensor | None = None,
) -> Trajectory:  # fmt: skip
    """The answer to a request; raises FloatingPointError where the model's output was not a distribution."""
    if not all(map(math.isfinite, logprobs)):
        raise FloatingPointError(
            f"the rollout model's log-probabilities for prompt {request.group}, sample {request.sample} are not finite:"
            " its weights or activations have overflowed"
        )
    finished = not request.ignore_end and sampling.ends(ids, request.offset, end_ids)
    return Trajectory(request.group, request.sample, ids, logprobs, finished, sampled=[True] * len(ids),
                      routes=routes)  # fmt: skip
