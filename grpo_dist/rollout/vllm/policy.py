"""The policy on the servers: written as files, loaded under a name of its own, and compared with the trainer's."""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ...config.schema import Config
from ...distributed.device import dtype_name, resolve_dtype
from ...distributed.ranks import Ranks
from ...distributed.watch import Interrupted
from ...model.export import adapter_state, merged_state, write_adapter, write_merged
from ...model.peft import PeftModel
from ...model.policy import Policy
from ...model.routing import Routers
from ..local import Weights
from ..sampling import sampling_of
from .client import Failed, Server, ServerError, Servers
from .messages import COMPLETIONS, Answer, one_token, read_answer, read_models, reports_routes, without_routes
from .probe import STOPS, Expected, expected_scores, is_stale, largest_gap, question

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Ask = Callable[..., Awaitable[Any]]
"""`Servers.attempt`, or `Servers.insist` with its retries."""

UNLOAD_SECONDS = 5.0
"""Longest time for the removal of adapters: a launcher kills a run that was asked to stop after half a minute, and a
server may hang."""
KEPT = 2
"""Policies on the servers: the newest one, and the one before it, which requests under way may sample from."""


@dataclass(frozen=True)
class Loaded:
    """The policy that the servers have."""

    model: str
    """The name to ask for."""
    path: str | None
    """Its adapter; None where it is the server's model itself."""
    expected: Expected
    gap: float
    """The largest gap of the probe over the servers (nats)."""
    failed: dict[str, str]
    """The servers that do not have it, with the reason."""


@dataclass(frozen=True)
class ServedRun:
    """A run that samples on servers."""

    config: Config
    ranks: Ranks
    weights: Weights
    """What the trainer computes with."""
    policy: Policy | None
    """What is trained; None for a model that never changes."""
    end_ids: list[int]
    routers: Routers | None = None
    """Those that take the experts which the servers took."""


class ServedPolicy:
    """Keeps the servers' policy that of the trainer. Its methods are collectives, but for `restore`."""

    def __init__(self, run: ServedRun, servers: Servers, step: int, needed: str) -> None:
        """`step` is that of the first update, `needed` how a server is started that serves this run."""
        self.run, self.servers, self._step, self._needed = run, servers, step, needed
        self._policy, self._ranks = run.policy, run.ranks
        self._sampling = sampling_of(run.config.rollout)
        self._dtype = resolve_dtype(run.config.model.dtype)
        self._directory = (Path(run.config.train.output_dir) / "rollout").absolute()
        self._tag = uuid.uuid4().hex[:8]  # of the main rank: two runs on a server never have the same name
        self._names: list[str] = []
        self._bases: dict[str, str] = {}  # what each server serves
        self._before: dict[str, tuple[Expected, Answer]] = {}
        self.loaded: Loaded | None = None
        servers.restore = self.restore

    @property
    def _has_adapters(self) -> bool:
        return self._policy is not None and isinstance(self._policy.model, PeftModel)

    def update(self, check: Callable[[], None]) -> None:
        """Bring the policy of now to the servers and compare; `check` is called meanwhile. Raises Interrupted on all
        ranks where that fails, or where `check` raises it."""
        state: dict[str, Tensor] = {}
        if self._policy is not None and self._has_adapters:
            state = adapter_state(self._policy, self._ranks.is_main)
        elif self._policy is not None:
            state = merged_state(self._policy, self._ranks.is_main, self._dtype)
        self.run.weights.sync()
        with self.run.weights.open() as model:
            expected = expected_scores(model, self._sampling, self.run.config.max_sequence_length,
                                       dtype_name(self._dtype))  # fmt: skip
        self.loaded = self.on_main(lambda: self._serve(state, expected, check))
        self._step += 1
        self.servers.begin(self.loaded.failed)

    def start(self) -> None:
        """Remove what a killed run has left, and look at the servers. Raises Interrupted on all ranks."""
        self.on_main(self._look)

    def close(self) -> None:
        """Remove the policy's files, and its adapters from servers that go on; on the main rank."""
        if self._ranks.is_main:
            self._remove(list(self._names))

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the main rank. Raises Interrupted on all ranks where it fails or is interrupted."""
        done: list[Result] = []
        ending: tuple[str, bool] | None = None
        if self._ranks.is_main:
            try:
                done = [work()]
            except Interrupted as asked:
                ending = str(asked), asked.failed
            except (ServerError, OSError, RuntimeError) as failure:
                reason = str(failure) if isinstance(failure, ServerError) else f"{type(failure).__name__}: {failure}"
                ending = f"rollout.vllm: {reason}", True
        done, ending = self._ranks.gather_objects((done, ending))[0]
        if ending is not None:
            raise Interrupted(ending[0], failed=ending[1])
        return done[0]

    def _look(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        # a network file system keeps a removed file that a server still reads
        self._directory.mkdir(parents=True, exist_ok=True)

        async def look(server: Server) -> None:
            base, adapters = await self.servers.insist(server, "GET", "/v1/models", read=read_models)
            longest, needed = base.get("max_model_len") or math.inf, self.run.config.max_sequence_length
            if longest < needed:
                raise ServerError(f"{server.url} serves sequences of {longest} tokens, expected {needed} "
                                  f"(data.max_prompt_length + rollout.max_completion_length)")  # fmt: skip
            self._bases[server.url] = base["id"]
            if self.run.routers is not None or self.run.config.rollout.stop:
                await self._require_fit(server, base["id"])
            for each in adapters:
                if Path(each.get("root") or "/").is_relative_to(self._directory):
                    log.warning("rollouts: %s still had %s of an earlier run", server.url, each["id"])
                    await self._unload(server, each["id"])

        self._bases.clear()
        self._each(look, all_must=True)
        if len(set(self._bases.values())) > 1 and not self._has_adapters:
            raise ServerError(f"the servers serve different models, {self._bases}: expected the same one")

    def _serve(self, state: dict[str, Tensor], expected: Expected, check: Callable[[], None]) -> Loaded:
        name = f"policy-{self._tag}-{self._step}"
        path = self._directory / name
        model = next(iter(self._bases.values()))
        if self._policy is not None:
            self._names.append(name)
            try:
                if self._has_adapters:
                    write_adapter(self._policy.model, state, path)
                    model = name
                else:
                    write_merged(self._policy.causal_lm, state, None, path)
            except Exception as error:
                raise ServerError(f"the policy cannot be written to {path} for the servers "
                                  f"({type(error).__name__}: {error})") from error  # fmt: skip
        answers: dict[str, Answer] = {}

        async def load(server: Server) -> None:
            if self._has_adapters:
                await _load_adapter(self.servers.insist, server, name, str(path))
            elif self._policy is not None:
                await self._reload(server, path)
            answers[server.url] = await self._answer(self.servers.insist, server, model, expected)

        failed = self._each(load, check)
        gaps = {url: largest_gap(expected, answer) for url, answer in answers.items()}
        for url, gap in gaps.items():
            self._require_same(url, gap, expected, answers[url])
        self._before = {url: (expected, answer) for url, answer in answers.items()}
        self._remove(self._names[:-KEPT] if self._has_adapters else list(self._names))
        return Loaded(model, str(path) if self._has_adapters else None, expected, max(gaps.values()), failed)

    def _require_same(self, url: str, gap: float, expected: Expected, answer: Answer) -> None:
        stale = url in self._before and is_stale(self._before[url], (expected, answer))
        if stale or not gap <= STOPS[expected.dtype]:
            raise ServerError(
                f"{url} does not sample from the policy: its log-probabilities of a fixed row are "
                + ("those of before the update" if stale else f"off by up to {gap:.3g} nats") +
                f", expected at most {STOPS[expected.dtype]:g} in {expected.dtype}. Does it serve another base model, "
                f"dtype or revision? This run needs: {self._needed}"
            )  # fmt: skip

    def _each(
        self, work: Callable[[Server], Any], check: Callable[[], None] = lambda: None, *, all_must: bool = False
    ) -> dict[str, str]:
        """Do something on every server; returns those on which it failed, with the reason. Raises ServerError where
        that is all of them, or one and `all_must`."""

        async def on_all() -> list[BaseException | None]:
            return await asyncio.gather(*map(work, self.servers.servers), return_exceptions=True)

        failed: dict[str, str] = {}
        for server, error in zip(self.servers.servers, self.servers.run(on_all(), check), strict=True):
            if isinstance(error, ServerError):
                failed[server.url] = str(error)
            elif error is not None:
                raise error
        if failed and (all_must or len(failed) == len(self.servers.servers)):
            reasons = "; ".join(failed.values())
            raise ServerError(f"{reasons}. This run needs servers that are started with: {self._needed}")
        for url, reason in failed.items():
            log.warning("rollouts: %s does not have the policy and is not used (%s)", url, reason)
        return failed

    async def _require_fit(self, server: Server, model: str) -> None:
        message = one_token(model, self.run.config.rollout.stop)
        reports = await self.servers.insist(server, "POST", COMPLETIONS, message, reports_routes)
        if self.run.routers is not None and not reports:
            raise ServerError(without_routes(server.url))

    async def _reload(self, server: Server, path: Path) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        await self.servers.insist(server, "POST", "/collective_rpc", call)
        # Blocks of the prefix cache have the old weights' keys and values. While any request runs, such as one that was
        # given up, they would stay: it begins again.
        reset = "/reset_prefix_cache?reset_running_requests=true"
        if not await self.servers.insist(server, "POST", reset, read=lambda content: content["success"]):
            raise ServerError(f"{server.url} keeps what its prefix cache has of the policy before")

    async def _answer(self, ask: Ask, server: Server, model: str, expected: Expected) -> Answer:
        """What a server answers to the probe."""
        message, routers = question(model, expected, self._sampling, self.run.end_ids), self.run.routers
        return await ask(
            server, "POST", COMPLETIONS, message, lambda content: read_answer(content, message, routers=routers)
        )

    async def _unload(self, server: Server, name: str) -> None:
        """Remove an adapter from a server, without trust that it is there, or that the server still answers."""
        try:
            message = {"lora_name": name}
            removal: Awaitable[Any] = self.servers.attempt(server, "POST", "/v1/unload_lora_adapter", message)
            await asyncio.wait_for(removal, UNLOAD_SECONDS)
        except (Failed, ServerError, asyncio.TimeoutError) as error:
            log.debug("%s: %s", server.url, error)

    def _remove(self, names: list[str]) -> None:
        """Remove policies from servers and disk."""

        async def unload(server: Server) -> None:
            await asyncio.gather(*(self._unload(server, name) for name in names))

        if self._has_adapters and names:
            self._each(unload)
        for name in names:
            shutil.rmtree(self._directory / name, ignore_errors=True)
            self._names.remove(name)

    async def restore(self, server: Server) -> None:
        """Make sure that a server has the policy after a failure: it may have been started again."""
        assert self.loaded is not None, "requests follow an update"
        loaded = self.loaded
        if loaded.path is not None:
            _, adapters = await self.servers.attempt(server, "GET", "/v1/models", read=read_models)
            if loaded.model not in [each["id"] for each in adapters]:
                await _load_adapter(self.servers.attempt, server, loaded.model, loaded.path)
        answer = await self._answer(self.servers.attempt, server, loaded.model, loaded.expected)
        self._require_same(server.url, largest_gap(loaded.expected, answer), loaded.expected, answer)


async def _load_adapter(ask: Ask, server: Server, name: str, path: str) -> None:
    await ask(server, "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
