"""A hub on this machine that serves one repository, and fails as it is told to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


@dataclass
class Hub:
    """Serves a directory as the repository `tiny/toy`."""

    files: Path
    status: int = 503
    """What a request that is to fail is answered with."""
    failures: int = 0
    """Requests that are still to fail."""
    url: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    """How often each file was downloaded (`GET NAME`) or asked about (`HEAD NAME`)."""

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        path = path.partition("?")[0]
        name = path.partition("/resolve/")[2].partition("/")[2]
        self.requests[f"{method} {name or path}"] += 1
        if self.failures > 0:
            self.failures -= 1
            return self.status, {"Retry-After": "1"}, b""
        if path == "/api/models/tiny/toy":
            names = [{"rfilename": file.name} for file in sorted(self.files.iterdir())]
            return 200, {}, json.dumps({"id": "tiny/toy", "sha": COMMIT, "siblings": names}).encode()
        file = self.files / name
        if name and file.is_file():
            data = file.read_bytes()
            return 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""


@contextlib.contextmanager
def served(files: Path) -> Iterator[Hub]:
    """The hub, while it runs."""
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
