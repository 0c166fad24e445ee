"""Show the report of runs while they go on, on a page that follows them: a server on this machine alone.

It listens on the loopback address, so that nobody else reaches it. For a run on another machine forward the port, as
with `ssh -L 8321:localhost:8321 MACHINE`. Ctrl-C ends it.

    python -m grpo_dist watch runs/quickstart
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..config.checks import require
from ..config.places import require_metrics

ADDRESS = "127.0.0.1"
LOOK_SECONDS = 1.0
"""Time between two looks at the runs' files."""
REST = 4.0
"""A new page is announced at the earliest after this many times the time that the last one took to make."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's train.output_dir")
    parser.add_argument("--port", type=int, default=8321, help="the port to listen on, 0 for any that is free (8321)")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Serve until Ctrl-C."""
    if rest:
        raise ValueError(f"watch: {' '.join(rest)!r} given, expected runs and --port N")
    require(0 <= options.port < 2**16, "--port", options.port, "0 to 65535")
    server = serve(options.runs, options.port)
    print(f"watching at http://localhost:{server.server_port} (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


def serve(directories: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of the page about these runs. Raises ValueError if one is no run, OSError if the port is taken."""
    pages = _Pages(directories)

    class Handler(_Handler):
        source = pages

    try:
        server = ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise OSError(f"--port: {port} given, where nothing can listen ({error.strerror}): choose another") from error
    server.daemon_threads = True
    return server


class _Pages:
    """The newest page, made when it is asked for."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self._lock = threading.Lock()
        self._made: tuple[str, bytes] = "", b""
        self._not_before = 0.0
        for directory in directories:
            require_metrics(directory)
        self.page()

    def version(self) -> str:
        """The version of the runs' files; after a page was made, it stays the same for a while."""
        if time.monotonic() < self._not_before:
            return self._made[0]
        return self._signature()

    def page(self) -> bytes:
        """The page of the newest version."""
        from .page import render
        from .reading import read_run

        with self._lock:
            version = self.version()
            if version != self._made[0]:
                begun = time.monotonic()
                page = render([read_run(directory) for directory in self._directories], live=version)
                self._made = version, page.encode()
                self._not_before = time.monotonic() + REST * (time.monotonic() - begun)
            return self._made[1]

    def _signature(self) -> str:
        states = [(directory / "metrics.jsonl").stat() for directory in self._directories if directory.exists()]
        return "-".join(f"{state.st_mtime_ns:x}.{state.st_size:x}" for state in states) or "none"


class _Handler(BaseHTTPRequestHandler):
    source: _Pages

    def do_GET(self) -> None:
        """Answer a browser on this machine."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ("localhost", ADDRESS):  # a page of elsewhere that has its name point here
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._send_page()
        elif self.path == "/events":
            self._send_events()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send_page(self) -> None:
        try:
            page = self.source.page()
        except (OSError, ValueError) as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(page)

    def _send_events(self) -> None:
        """The version of the runs, again and again (server-sent events, HTML Living Standard 9.2)."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        try:
            while True:
                self.wfile.write(f"data: {self.source.version()}\n\n".encode())
                self.wfile.flush()
                time.sleep(LOOK_SECONDS)
        except OSError:  # the browser has closed the page, or the run's directory is gone
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing of requests."""
