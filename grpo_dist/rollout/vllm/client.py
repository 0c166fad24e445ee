"""vLLM servers over HTTP: load, retries, and which server gets a request. Knows neither ranks nor weights."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Hashable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.request import ProxyHandler, Request, build_opener

from ...rewards.http import authorization, backoff_seconds, may_pass

log = logging.getLogger(__name__)

Read = TypeVar("Read")

AUTH_VARIABLE = "VLLM_API_KEY"
"""The environment variable with the bearer token; vLLM servers read the same one."""
AT_ONCE = 256
"""Most requests of a rank to a server at once; further ones wait here."""
CONNECT_SECONDS = 10.0
_IDLE_SECONDS = 2.0
"""Connections that were idle for longer are not used again: servers close theirs after 5 seconds."""
_SHOWN_CHARACTERS = 500
_LOOK_SECONDS = 0.1
"""Time between two looks at whether somebody still waits."""
UNREADABLE = (AttributeError, LookupError, TypeError, ValueError)
"""What is raised where an answer is not of the form that is read."""


class ServerError(RuntimeError):
    """A server refused what it was asked, or no server is left."""


def key() -> dict[str, str]:
    """The header with the key of servers that ask for one. Raises ValueError where it cannot be one."""
    return authorization(AUTH_VARIABLE) if os.environ.get(AUTH_VARIABLE) else {}


def ask(url: str, path: str, message: Any = None, *, timeout_seconds: float) -> bytes:
    """What a server answers to one request outside of a run, which like those of a run goes past the proxies that the
    environment names. Raises OSError, and ValueError for a key that cannot be one."""
    content = None if message is None else json.dumps(message).encode()
    request = Request(url.rstrip("/") + path, content, {"Content-Type": "application/json"} | key())
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=timeout_seconds) as answer:
            return bytes(answer.read())
    except HTTPException as error:  # something else listens there
        raise OSError(f"{type(error).__name__} {error}") from error


class Failed(Exception):
    """One attempt failed, and another one may succeed."""


@dataclass
class Server:
    """A server, as one rank sees it."""

    url: str
    tokens: int = 0
    """Prompts and longest completions of this rank's requests that it works on."""
    failures: int = 0
    """Failures in a row."""
    usable_at: float = 0.0
    """The time (of the monotonic clock) before which it gets no request, after a failure."""
    restore: bool = False
    """Whether it may have lost the policy, as a server that was started again has."""
    restoring: asyncio.Lock = field(default_factory=asyncio.Lock)
    last: str = ""
    """The last failure."""


@dataclass
class Servers:
    """All servers of a run, on an event loop in a thread of its own."""

    urls: list[str]
    timeout_seconds: float
    retries: int
    first: int = 0
    """The server that gets the first request: ranks begin with different ones."""
    obituary: Callable[[], str | None] = lambda: None
    """Why the server that the run has started has ended, with its last words; None where it runs, or is none."""
    restore: Callable[[Server], Awaitable[None]] | None = None
    """Makes sure that a server has the policy; raises Failed and ServerError."""
    retried: int = 0
    """Requests made again."""
    _homes: dict[Hashable, Server] = field(default_factory=dict)
    _client: Any = None

    def __post_init__(self) -> None:
        start = self.first % len(self.urls)
        self.servers = [Server(url) for url in [*self.urls[start:], *self.urls[:start]]]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        self._room = asyncio.Semaphore(AT_ONCE * len(self.servers))
        self._headers = key()

    def start(self, work: Coroutine[Any, Any, Read]) -> concurrent.futures.Future[Read]:
        """Let the loop work on something."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Read], check: Callable[[], None] = lambda: None) -> Read:
        """Wait for a piece of work; it is given up where `check`, which is called meanwhile, raises."""
        future = self.start(work)
        try:
            while not future.done():
                check()
                concurrent.futures.wait([future], _LOOK_SECONDS)
        finally:
            future.cancel()
        return future.result()

    def close(self) -> None:
        """Close the connections and end the thread."""

        async def shut() -> None:
            if self._client is not None:
                await self._client.aclose()

        if self._loop.is_running():
            self.run(shut())
            self._loop.call_soon_threadsafe(self._loop.stop)

    def begin(self, without: Collection[str]) -> None:
        """Forget earlier failures: there is a new policy, and all servers but those at the urls `without` have it."""
        self._homes.clear()
        for server in self.servers:
            server.failures = self.retries + 1 if server.url in without else 0
            server.usable_at, server.restore = 0.0, False

    async def post(
        self, path: str, payload: dict[str, Any], read: Callable[[Any], Read], *, tokens: int, home: Hashable
    ) -> Read:
        """The result of `read` on the answer of some server: the one that requests of the same `home` go to, which have
        a prompt in common, while it works; for a new home the one with the fewest tokens to work on.

        Raises ServerError where a server refuses it, or none answers.
        """
        failures = 0
        async with self._room:
            while True:
                server = await self._choose(home)
                server.tokens += tokens
                try:
                    await self._restore(server)
                    answer = await self.attempt(server, "POST", path, payload, read)
                except Failed as error:
                    failures += 1
                    self._count_failure(server, str(error))
                    if failures > self.retries:
                        raise ServerError(f"{server.url}: {error} ({failures} attempts of one request)") from error
                    self.retried += 1
                else:
                    server.failures = 0
                    return answer
                finally:
                    server.tokens -= tokens

    async def attempt(
        self, server: Server, method: str, path: str, payload: Any = None, read: Callable[[Any], Read] | None = None
    ) -> Read:
        """Make one request of one server. Raises Failed where it may be made again, else ServerError."""
        import httpx2

        if self._client is None:
            self._client = httpx2.AsyncClient(
                timeout=httpx2.Timeout(self.timeout_seconds, connect=CONNECT_SECONDS, pool=None),
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=AT_ONCE,
                                      keepalive_expiry=_IDLE_SECONDS),
                headers=self._headers, trust_env=False,
            )  # fmt: skip
        try:
            response = await self._client.request(method, server.url.rstrip("/") + path, json=payload)
        except httpx2.RequestError as error:
            server.restore = True
            raise Failed(f"{type(error).__name__} {error}".strip()) from error
        shown = repr(response.text[:_SHOWN_CHARACTERS])
        if response.status_code == 404 and isinstance(payload, dict) and "model" in payload:
            server.restore = True  # the policy's name is not known: the server was started again
            raise Failed(f"status 404: {shown}")
        if may_pass(response.status_code):
            raise Failed(f"status {response.status_code}: {shown}")
        if response.status_code == 401:
            raise ServerError(f"{server.url} asks for {'another' if self._headers else 'a'} key (status 401): export "
                              f"it as {AUTH_VARIABLE} before the launch")  # fmt: skip
        if not response.is_success:
            raise ServerError(f"{server.url}{path} refuses: status {response.status_code}: {shown}")
        if read is None:
            return response
        try:
            return read(response.json())
        except UNREADABLE as error:
            raise Failed(f"an answer that is none ({type(error).__name__}: {error}): {shown}") from error

    async def insist(
        self, server: Server, method: str, path: str, payload: Any = None, read: Callable[[Any], Read] | None = None
    ) -> Read:
        """The same with retries. Raises ServerError where all attempts failed."""
        for attempt in range(self.retries + 1):
            try:
                return await self.attempt(server, method, path, payload, read)
            except Failed as error:
                reason = self.obituary()
                if attempt == self.retries or reason:
                    raise ServerError(
                        f"{server.url}{path}: {error} ({attempt + 1} attempts). {reason or ''}"
                    ) from error
                await asyncio.sleep(backoff_seconds(attempt + 1))
        raise AssertionError("the last attempt returns or raises")

    async def _restore(self, server: Server) -> None:
        async with server.restoring:
            if server.restore and self.restore is not None:
                try:
                    await self.restore(server)
                except ServerError as error:  # others may have the policy
                    raise Failed(str(error)) from error
                server.restore = False

    async def _choose(self, home: Hashable) -> Server:
        """The server for the next attempt, after a wait where all failed. Raises ServerError where none is left."""
        while True:
            left = [server for server in self.servers if server.failures <= self.retries]
            ended = self.obituary()
            if not left or ended:
                raise ServerError(ended or "no server answers. " + "; ".join(f"{each.url}: {each.last}"
                                                                            for each in self.servers))  # fmt: skip
            now = time.monotonic()
            usable = [server for server in left if server.usable_at <= now]
            if usable:
                chosen = self._homes.get(home)
                if chosen not in usable:
                    chosen = self._homes[home] = min(usable, key=lambda server: (server.failures > 0, server.tokens))
                assert chosen is not None
                return chosen
            await asyncio.sleep(max(0.01, min(server.usable_at for server in left) - now))

    def _count_failure(self, server: Server, reason: str) -> None:
        """Many requests fail at once where a server dies: they count as one."""
        server.last, now = reason, time.monotonic()
        if now < server.usable_at:
            return
        server.failures += 1
        server.usable_at = now + backoff_seconds(server.failures)
        if server.failures > self.retries and len(self.servers) > 1:
            log.warning("rollouts: %s is not used before the next policy (%s)", server.url, reason)
