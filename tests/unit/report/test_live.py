"""The page that follows a run, over real HTTP and in a real browser."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, find_chromium
from runs_on_disk import write_run

from grpo_dist.cli.main import main
from grpo_dist.report.live import serve


def go_on(run: Path, step: int) -> None:
    """Write one more step, as the recorder does."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "reward/mean": 1.0, "loss": 0.5}) + "\n")


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A run, and the address of its page."""
    run = write_run(tmp_path / "run", num_steps=3)
    server = serve([run], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield run, f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_new_step_is_announced_and_on_the_page(watched: tuple[Path, str]) -> None:
    run, address = watched
    with urllib.request.urlopen(f"{address}/events", timeout=20) as events:
        first = events.readline()
        assert first.startswith(b"data: ")
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert f'"live":"{first.decode().removeprefix("data: ").strip()}"' in answer.read().decode()
        go_on(run, 4)
        while (line := events.readline()) in (first, b"\n"):
            pass
        assert line.startswith(b"data: ")
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert '"step":[0,1,2,3,4]' in answer.read().decode()


def test_who_gets_nothing(watched: tuple[Path, str]) -> None:
    """A page of elsewhere whose name points to this machine, and other paths."""
    for path, host, status in (("", "evil.example:80", 403), ("/../secret", "localhost:1", 404)):
        request = urllib.request.Request(watched[1] + path, headers={"Host": host})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)
        assert refused.value.code == status


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_follows_and_keeps_what_the_reader_chose(watched: tuple[Path, str], width: int) -> None:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here (Debian, Ubuntu: apt-get install chromium)")
    run, address = watched
    page = Page(chromium)
    try:
        page.open(address, width)
        page.js("document.getElementById('others').open = true; document.getElementById('alarms').open = false")
        page.js("""document.getElementById("text").value = "prompt 1";
            document.getElementById("text").dispatchEvent(new Event("input", { bubbles: true }));
            document.getElementById("theme").click(); window.before = true""")
        assert page.js("document.documentElement.scrollWidth") <= width
        go_on(run, 4)
        page.wait_for_reload("""!window.before && document.getElementById("step")?.max === "4" """)
        assert page.js("""document.getElementById("text").value""") == "prompt 1"
        assert page.js("document.documentElement.dataset.theme") == "dark"
        assert page.js("""document.getElementById("live").textContent""") == "Follows the run."
        assert page.js("document.getElementById('others').open && !document.getElementById('alarms').open")
        page.js("document.querySelector('.rows').scrollIntoView({ behavior: 'instant' }); window.before = true")
        go_on(run, 5)
        page.wait_for("!document.getElementById('now').hidden")
        page.js("new Promise((done) => setTimeout(done, 2500))")
        assert page.js("window.before"), "completions that are read stay in their place"
        page.js("scrollTo({ top: 0, behavior: 'instant' })")
        page.wait_for_reload("""!window.before && document.getElementById("step")?.max === "5" """)
        assert page.complaints == []
    finally:
        page.close()


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="a job in the background ignores SIGINT")
def test_the_verb_serves_until_it_is_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["watch", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_dist", *words, str(write_run(tmp_path / "run"))], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = process.stdout.readline().split()[2]
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert b"<title>run" in answer.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert main([*words, str(tmp_path / "none")]) == 2
    assert "expected that of a run" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "run"), "--port", "65536"]) == 2
    assert "--port: 65536 given, expected 0 to 65535" in capsys.readouterr().err
