"""A small OpenAI-compatible server on loopback that can be told to misbehave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str
"""`ok`, `slow`, `cut`, `json` (broken), `empty` (valid JSON, not an answer), `hang`, or a status such as `429`."""


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    request_queue_size = 512


class Server:
    """Answers POSTs with what `answer` makes of their JSON, after the faults that are queued; a context manager."""

    def __init__(self, answer: Callable[[Any], Any], host: str = "127.0.0.1", port: int = 0) -> None:
        self.answer = answer
        self.faults: list[Fault] = []
        self.always: Fault = "ok"
        self.requests: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._ended = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._handle(self)

            do_GET = do_POST

            def log_message(self, *_: object) -> None: ...

        self._http = _Http((host, port), Handler)
        self.url = f"http://{'[::1]' if ':' in host else '127.0.0.1'}:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True  # connections that are open get no answer
        self._http.shutdown()
        self._http.server_close()

    def reply(self, path: str, given: Any) -> tuple[int, Any]:
        """Status and JSON for a message to a path, where no fault is due."""
        return 200, self.answer(given)

    def has_faults(self, path: str) -> bool:
        """Whether faults are for messages to this path."""
        return True

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if self._ended:
            handler.close_connection = True
            return
        given, fault = json.loads(body) if body else None, "ok"
        with self._lock:
            self.requests.append(given)
            self.headers.append(dict(handler.headers))
            if self.has_faults(handler.path):
                fault = self.faults.pop(0) if self.faults else self.always
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._send(handler, given, fault)
        finally:
            with self._lock:
                self._at_once -= 1

    def _send(self, handler: BaseHTTPRequestHandler, given: Any, fault: Fault) -> None:
        if fault == "slow":
            time.sleep(0.1)
        if fault == "hang":
            time.sleep(3)
        broken = {"json": b'{"choices": [', "empty": b"{}"}.get(fault)
        status, answer = (int(fault), {"error": "no"}) if fault.isdigit() else (200, None)
        if not broken and status == 200:
            status, answer = self.reply(handler.path, given)
        content = broken or json.dumps(answer).encode()
        handler.send_response(status)
        if status == 429:
            handler.send_header("Retry-After", "0.1")
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content) + (100 if fault == "cut" else 0)))
        handler.end_headers()
        handler.wfile.write(content)
        if fault == "cut":
            handler.close_connection = True


def chat_reply(text: str) -> dict[str, Any]:
    """An answer of /v1/chat/completions."""
    return {
        "choices": [{"message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }
