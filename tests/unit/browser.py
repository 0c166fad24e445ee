"""Headless Chromium, driven over a pipe in its own protocol: nothing has to be installed but the browser itself."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip

LOADED = """new Promise((done) => {
  const look = () => (document.readyState === "complete" && location.protocol !== "about:"
    ? requestAnimationFrame(() => requestAnimationFrame(done)) : setTimeout(look, 10));
  look();
})"""
"""A promise for the time when the page has run its script and drawn once more."""


def find_chromium() -> str | None:
    """The browser's place, or None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One page of one browser; `complaints` are its errors and what its security policy refused."""

    def __init__(self, chromium: str) -> None:
        self.complaints: list[str] = []
        self._numbers = itertools.count(1)
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_here, write_there = os.pipe()
        read_there, self._out = os.pipe()
        # the protocol wants its pipe at 3 and 4, wherever Python has opened it
        start = f'exec "$0" "$@" 3<&{read_there} 4>&{write_there}'
        self._process = subprocess.Popen(
            ["bash", "-c", start, chromium, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(read_there, write_there), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_there)
        os.close(write_there)
        self._in = os.fdopen(read_here, "rb")
        self._session: str | None = None
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._in.read(1)) not in (b"\0", b""):
            text += byte
        if not text:
            raise RuntimeError("the browser is gone")
        message = json.loads(text)
        told = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(told["args"]))
        return message

    def open(self, place: Path | str, width: int, dark: bool = False, **media: str) -> None:
        """Show a file or an address at a width, in a theme and with media features such as `prefers_reduced_motion`."""
        features = {"prefers_color_scheme": "dark" if dark else "light", **media}
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=named)
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        self.send("Page.navigate", url=place if isinstance(place, str) else place.absolute().as_uri())
        self.js(LOADED)

    def js(self, expression: str) -> Any:
        """The value of an expression on the page; a promise is waited for."""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true on the page. Raises RuntimeError where it has not become so in 20 s."""
        self.js(f"""new Promise((done, fail) => {{
          const look = () => ({expression} ? done() : setTimeout(look, 10));
          setTimeout(() => fail("waited in vain"), 20000);
          look();
        }})""")

    def wait_for_reload(self, expression: str) -> None:
        """Wait as `wait_for` does, although the page may be loaded again meanwhile."""
        deadline = time.monotonic() + 20
        while True:
            with suppress(RuntimeError):  # what an expression ran on is gone
                if self.js(expression):
                    return
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited in vain for {expression}")
            time.sleep(0.05)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that a CSS selector finds."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((found) => found.textContent)")

    def style(self, selector: str, name: str) -> str:
        """A computed style of the first element that a CSS selector finds."""
        return self.js(f"getComputedStyle(document.querySelector({json.dumps(selector)})).{name}")

    def press(self, key: str) -> None:
        """Press and release a key, such as `Tab`."""
        number = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=number)

    def drag(self, selector: str, start: float, end: float) -> None:
        """Drag the mouse over the first element that a CSS selector finds, between two shares of its width."""
        left, width, y = self.js(f"""(() => {{ const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{ block: "center", behavior: "instant" }});
            const box = node.getBoundingClientRect(); return [box.left, box.width, box.top + box.height / 2]; }})()""")
        for kind, share in (
            ("mouseMoved", start),
            ("mousePressed", start),
            ("mouseMoved", end),
            ("mouseReleased", end),
        ):
            self.send("Input.dispatchMouseEvent", type=kind, x=left + share * width, y=y, clickCount=1,
                      button="none" if kind == "mouseMoved" else "left", buttons=1)  # fmt: skip

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Save what is seen as PNG, or the whole page."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=whole, **(
            {"clip": {"x": 0, "y": 0, "width": self.js("innerWidth"), "height": self.js("document.body.scrollHeight"),
                      "scale": 1}} if whole else {}))  # fmt: skip
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """End the browser."""
        self.send("Browser.close")
        self._process.wait(20)
        self._in.close()
        os.close(self._out)
        self._profile.cleanup()
