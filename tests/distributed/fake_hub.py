"""As much of the Hugging Face hub, on loopback, as an upload of small files needs; the client is the real one."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """A hub with one repository; a context manager."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        """What was committed, by path."""
        self.created: list[dict[str, Any]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                given = self.rfile.read(int(self.headers["Content-Length"])).decode()
                content = json.dumps(hub._answer(self.path, given)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _answer(self, path: str, given: str) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.created.append(json.loads(given))
            return {"url": f"{self.url}/me/model"}
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(given)["files"]]
            return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]}
        if path.endswith("/commit/main"):
            lines = [json.loads(line) for line in given.splitlines()]
            self.files |= {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
                           if line["key"] == "file"}  # fmt: skip
            return {"commitUrl": f"{self.url}/me/model/commit/{'a' * 40}", "commitOid": "a" * 40}
        return {"errors": [], "warnings": []}  # of the model card's front matter
