"""JSON over HTTP for rewards that ask a service: bounded concurrency, retries with backoff, and errors without secrets.

A request is repeated after a connection that fails or breaks, a time-out, the statuses 408, 425, 429 and 5xx, and an
answer that is no JSON or lacks the required content. Any other status is an error of the caller and is raised at once.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Read = TypeVar("Read")

_RETRIED = frozenset({408, 425, 429})
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 30.0
_SHOWN_CHARACTERS = 300


def may_pass(status: int) -> bool:
    """Whether a request that was answered with this status may succeed later."""
    return status in _RETRIED or status >= 500


def backoff_seconds(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    return min(_FIRST_WAIT_SECONDS * 2 ** (failures - 1), _LONGEST_WAIT_SECONDS)


def authorization(variable: str) -> dict[str, str]:
    """The header with the bearer token that an environment variable has.

    Raises ValueError where no header takes it: a client's own message would have the token in it.
    """
    token = os.environ[variable]
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"{variable} has a line break or another character that no header takes: export it without")
    return {"Authorization": f"Bearer {token}"}


class ServiceError(RuntimeError):
    """A service did not return the required content; the message says what it returned."""


@dataclass(frozen=True)
class Reply:
    """The answer of a service."""

    content: Any
    """The result of the caller's `read`."""
    seconds: float
    """Time of the attempt that succeeded."""
    retries: int
    """Attempts before it."""


class Client:
    """Posts to one service, for the lifetime of its process, on one event loop."""

    def __init__(
        self, url: str, auth_variable: str | None, concurrency: int, retries: int, request_seconds: float
    ) -> None:
        """`auth_variable` names the environment variable with the bearer token.

        Raises ValueError where the variable is not in this process's environment or is no token, or a number is out of
        range.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: {url!r} given, expected one that starts with http:// or https://")
        if concurrency < 1 or retries < 0 or request_seconds <= 0:
            raise ValueError(
                f"concurrency {concurrency}, retries {retries} and request_seconds {request_seconds} given, expected "
                "at least 1, at least 0 and more than 0"
            )
        if auth_variable is not None and not os.environ.get(auth_variable):
            raise ValueError(
                f"auth_variable: {auth_variable} is not set in the reward's environment; list it under the reward's "
                f"`environment: [{auth_variable}]`, and export it before the launch"
            )
        self.url = url
        self._headers = authorization(auth_variable) if auth_variable else {}
        self._retries, self._request_seconds = retries, request_seconds
        self._semaphore = asyncio.Semaphore(concurrency)
        self._client: Any = None

    async def post(self, payload: dict[str, Any], read: Callable[[Any], Read]) -> Reply:
        """Post JSON and return the result of `read` on the JSON of the answer, after a wait for a free connection.

        `read` raises LookupError, TypeError or ValueError where the answer lacks the required content. Raises
        ServiceError when all attempts have failed.
        """
        async with self._semaphore:
            for attempt in range(self._retries + 1):
                begun = time.monotonic()
                try:
                    content = await self._attempt(payload, read)
                    return Reply(content, time.monotonic() - begun, attempt)
                except _TryAgainError as error:
                    if attempt == self._retries:
                        raise ServiceError(f"{self.url}: {error} ({attempt + 1} attempts)") from error
                    wait_seconds = error.wait_seconds
                await asyncio.sleep(min(max(wait_seconds, backoff_seconds(attempt + 1)), _LONGEST_WAIT_SECONDS))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, payload: dict[str, Any], read: Callable[[Any], Read]) -> Read:
        import httpx2

        if self._client is None:
            self._client = httpx2.AsyncClient(timeout=self._request_seconds, headers=self._headers)
        try:
            response = await self._client.post(self.url, json=payload)
        except httpx2.RequestError as error:
            raise _TryAgainError(f"{type(error).__name__} {error}".strip()) from error
        shown = repr(response.text[:_SHOWN_CHARACTERS])
        if may_pass(response.status_code):
            wait_seconds = _seconds(response.headers.get("retry-after"))
            raise _TryAgainError(f"status {response.status_code}: {shown}", wait_seconds)
        if not response.is_success:
            raise ServiceError(f"{self.url}: status {response.status_code}: {shown}")
        try:
            return read(response.json())
        except (LookupError, TypeError, ValueError) as error:
            raise _TryAgainError(f"answered {shown} ({type(error).__name__}: {error})") from error


class _TryAgainError(Exception):
    """An attempt failed, and another one may succeed."""

    def __init__(self, message: str, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


def _seconds(retry_after: str | None) -> float:
    """Read a Retry-After header in seconds; a header with a date counts as none."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0
