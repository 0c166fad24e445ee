"""Messages of bytes over a socket, with time limits, between the pool and its workers.

A message is its length (8 bytes) and its content. EOFError or OSError is raised where the peer has ended.
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
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if length > _MOST_BYTES:
            raise ValueError(f"a message of {length} bytes was announced: something else has written to the channel")
        return self._read(length, deadline)

    def answer(self, value: dict[str, Any]) -> None:
        """Send a worker's answer as JSON; a lone surrogate becomes "?", since no tokenizer and no file takes one."""
        self.send(json.dumps(value, ensure_ascii=False).encode(errors="replace"))

    def close(self) -> None:
        """Close this end."""
        self._connection.close()

    def _read(self, count: int, deadline: float | None) -> bytes:
        content = bytearray()
        while len(content) < count:
            if deadline is not None:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError
                self._connection.settimeout(remaining)
            else:
                self._connection.settimeout(None)
            received = self._connection.recv(min(count - len(content), _READ_BYTES))
            if not received:
                raise EOFError("the other end of the channel is closed")
            content += received
        return bytes(content)
