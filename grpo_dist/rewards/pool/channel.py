"""Messages of bytes over a socket, with time limits, between the pool and its workers.

A message is its length (8 bytes) and its content. EOFError or OSError is raised where the peer has ended. Time in which
this process is stopped, by Ctrl-Z or with its container, does not count: the peer may have been stopped as well.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

_LENGTH = struct.Struct("!Q")
_MOST_BYTES = 1 << 34  # far above any batch: a greater length is not a message, but bytes of another writer
_READ_BYTES = 1 << 20
_LOOK_SECONDS = 1.0
"""Longest single wait. One that lasts more than twice as long has been stopped."""


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: bytes, timeout_seconds: float | None = None) -> None:
        """Send one message; raises TimeoutError where the peer does not take all of it in time."""
        self._connection.settimeout(timeout_seconds)
        self._connection.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, timeout_seconds: float | None = None) -> bytes:
        """Wait for one complete message; raises TimeoutError where it is late, ValueError where it is no message."""
        limit = None if timeout_seconds is None else _Limit(timeout_seconds)
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, limit))
        if length > _MOST_BYTES:
            raise ValueError(f"a message of {length} bytes was announced: something else has written to the channel")
        return self._read(length, limit)

    def answer(self, value: dict[str, Any]) -> None:
        """Send a worker's answer as JSON."""
        self.send(encoded(value))

    def close(self) -> None:
        """Close this end."""
        self._connection.close()

    def _read(self, count: int, limit: _Limit | None) -> bytes:
        content = bytearray()
        while len(content) < count:
            self._connection.settimeout(None if limit is None else limit.wait_seconds())
            begun = time.monotonic()
            try:
                received = self._connection.recv(min(count - len(content), _READ_BYTES))
            except TimeoutError:
                continue
            finally:
                if limit is not None:
                    limit.passed(time.monotonic() - begun)
            if not received:
                raise EOFError("the other end of the channel is closed")
            content += received
        return bytes(content)


class _Limit:
    """Seconds that a message may still take."""

    def __init__(self, seconds: float) -> None:
        self._remaining = seconds

    def wait_seconds(self) -> float:
        """How long to wait at once; raises TimeoutError where no time remains."""
        if self._remaining <= 0:
            raise TimeoutError
        return min(self._remaining, _LOOK_SECONDS)

    def passed(self, seconds: float) -> None:
        """Count the seconds of a wait."""
        self._remaining -= min(seconds, 2 * _LOOK_SECONDS)


def encoded(answer: dict[str, Any]) -> bytes:
    """A worker's answer as JSON; a lone surrogate becomes "?", since no tokenizer and no file takes one."""
    return json.dumps(answer, ensure_ascii=False).encode(errors="replace")
