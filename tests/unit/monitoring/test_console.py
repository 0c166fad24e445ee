"""What a run shows: right at any width, harmless whatever a model writes, and a log without control characters."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from grpo_dist.monitoring.alarms import Alarm
from grpo_dist.monitoring.console import Display, set_up_logging
from grpo_dist.monitoring.contrast import contrast, contrast_table
from grpo_dist.monitoring.live_view import LiveView, clock, shares_of_time, sparkline, split_bar
from grpo_dist.types import Batch, Prompt

METRICS = {
    "step": 3, "reward/mean": 0.5, "kl": 0.0123, "entropy": 0.4, "completion/length_mean": 12.34, "time/step": 2.0,
    "completion/truncated": 0.25, "grad_norm": 0.8, "rollout/tokens_per_second": 12345.6, "memory/peak_gib": 1.23,
    "time/rollout": 1.0, "time/reward": 0.1, "time/reference": 0.3, "time/update": 0.5, "time/sync": 0.05,
}  # fmt: skip
HOSTILE = "\x1b[2J\x1b]0;title\x07[bold red]x[/] \u202egnp.exe\u2066 \r\x9b31m" + "long " * 100_000
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_sparkline() -> None:
    assert sparkline([], 10) == sparkline([1.0], 0) == ""
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 20) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0], 10) == "▅▅"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert len(sparkline(list(range(1000)), 60)) == 60


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [0.333, 0.333, 0.334], [0.98, 0.01, 0.01], [0.0, 1e-9, 1.0]])
@pytest.mark.parametrize("width", [0, 1, 7, 60])
def test_a_bar_is_filled_in_proportion(shares: list[float], width: int) -> None:
    cells = split_bar(shares, width)
    assert sum(cells) == width
    assert all(abs(count - share / sum(shares) * width) < 1 for count, share in zip(cells, shares, strict=True))


def test_shares_of_time() -> None:
    shares = shares_of_time(METRICS)
    assert shares["rollout"] == 0.5 and shares["other"] == pytest.approx(0.025)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares_of_time({}) == {}
    assert clock(3723.4) == "1:02:03"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_view_fits_any_width(width: int) -> None:
    view = LiveView(60, 0)
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    console.print(view)
    assert "step 0/60" in out.getvalue(), "before the first step"
    for step in range(1, 50):
        view.add(METRICS | {"step": step, "reward/mean": step / 50})
    view.ringing = ["truncated"]
    console.print(view)
    lines = out.getvalue().splitlines()
    assert all(cell_len(line) < width for line in lines)
    assert width < 40 or any("▁" in line and "█" in line for line in lines)
    if width >= 80:
        for part in ("step 49/60", "left", "reward 0.980", "kl 0.0123", "entropy 0.400", "length 12.3", "truncated 25%",
                     "12,346 tok/s", "1.2 GiB", "rollout 50%", "update 25%", "other 2%",
                     "alarms on: truncated"):  # fmt: skip
            assert part in out.getvalue(), part


def batch(rewards: list[float], groups: list[int], lengths: list[int]) -> Batch:
    count = sum(lengths)
    prompts = [Prompt(n, [1, 2], f"prompt {n}", None, {}) for n in range(max(groups) + 1)]
    reward = torch.tensor(rewards, dtype=torch.float64)
    return Batch(prompts, torch.tensor(groups), torch.tensor(lengths), torch.tensor([n % 2 == 0 for n in lengths]),
                 torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool), torch.zeros(count),
                 reward[:, None], reward, advantages=torch.zeros(count))  # fmt: skip


def test_the_contrast_is_of_the_group_that_differs_most() -> None:
    nan = float("nan")
    given = batch([0.5, 0.5, 0.2, 0.9, nan, 0.1, nan, 5.0], [0, 0, 1, 1, 1, 2, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8])
    given = replace(given, advantages=torch.repeat_interleave(torch.arange(8.0), given.lengths))
    prompt, best, worst = contrast(given, [f"text {n}" for n in range(8)]) or pytest.fail("none")
    assert prompt == "prompt 1"
    assert (best.text, best.reward, best.advantage, best.num_tokens, best.finished) == ("text 3", 0.9, 3.0, 4, True)
    assert (worst.text, worst.reward, worst.advantage, worst.finished) == ("text 2", 0.2, 2.0, False)
    assert contrast(batch([nan, nan, 1.0], [0, 0, 1], [1, 1, 1]), ["a", "b", "c"]) is None
    high = contrast(batch([5.0, 5.1, 0.0, 1.0, 0.5], [0, 0, 1, 1, 1], [1] * 5), list("abcde"))
    equal = contrast(batch([0.5, 0.5], [0, 0], [1, 1]), ["a", "b"])
    assert high is not None and high[1].text == "d", "a difference counts, not how high the rewards are"
    assert equal is not None and (equal[2].text, equal[1].text) == ("a", "b")


def test_the_contrast_says_which_completion_is_cut_off() -> None:
    given = batch([0.0, 1.0], [0, 0], [1, 2])
    _, best, worst = contrast(given, ["one", "other"]) or pytest.fail("none")
    assert best.finished and not worst.finished
    table = contrast_table(7, "prompt", best, worst)
    headers = [str(column.header) for column in table.columns]
    assert ["cut off" in header for header in headers] == [False, True]


@pytest.mark.parametrize("width", [30, 100])
def test_what_a_model_writes_is_shown_as_text(width: int) -> None:
    given = batch([0.0, 1.0], [0, 0], [1, 2])
    _, best, worst = contrast(given, [HOSTILE, "[link=x]fine[/link] 数学"]) or pytest.fail("none")
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    console.print(contrast_table(7, HOSTILE, best, worst))
    shown = out.getvalue()
    assert not CONTROL.search(shown), CONTROL.findall(shown)
    if width == 100:  # else lines break in them, side by side
        assert shown.count("[bold red]") == 2 and "[link=x]fine[/link]" in shown
    assert len(shown) < 8000 and all(cell_len(line) <= width for line in shown.splitlines())


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Standard error as a file, and logging set up as in a run."""
    root, own, deepspeed = logging.getLogger(), logging.getLogger("grpo_dist"), logging.getLogger("DeepSpeed")
    for library in ("huggingface_hub", "datasets"):
        monkeypatch.setattr(logging.getLogger(library), "propagate", True)
    kept, level, own_level, filters = root.handlers[:], root.level, own.level, deepspeed.filters[:]
    root.handlers.clear()
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")
    set_up_logging()
    yield stream
    root.handlers[:] = kept
    root.setLevel(level)
    own.setLevel(own_level)
    deepspeed.filters[:] = filters


def test_deepspeed_says_only_what_it_warns_of(logged: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, handler = logging.getLogger("DeepSpeed"), logging.StreamHandler(logged)
    monkeypatch.setattr(logger, "level", logging.INFO)  # as its import has it, which comes later
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.info("a summary")
    logger.warning("a warning")
    assert "a summary" not in logged.getvalue() and "a warning" in logged.getvalue()


@pytest.mark.parametrize("library", ["huggingface_hub", "datasets"])
def test_a_line_of_a_library_is_there_once(logged: io.StringIO, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setattr(logging.getLogger(library), "handlers", [logging.StreamHandler(logged)])  # as its import adds
    logging.getLogger(f"{library}.utils").warning("retrying")
    assert logged.getvalue().count("retrying") == 1


def run_display() -> None:
    """A short run, as train.py shows it."""
    display = Display(10, 0, active=True, show_completions_every=1)
    given = batch([0.0, 1.0], [0, 0], [1, 2])
    for step in range(1, 3):
        display.phase("rollout")
        display.completions(step, given, [f"bad {HOSTILE}", "good one"])
        display.step(METRICS | {"step": step})
    display.alarms([Alarm(2, "truncated", "completion/truncated", 0.6, 0.5, "60% of all")], {"truncated"})
    logging.getLogger("grpo_dist").warning("a reward said %s", HOSTILE)
    display.close()


def test_a_log_has_a_line_a_step_and_no_control_characters(logged: io.StringIO) -> None:
    run_display()
    text = logged.getvalue()
    assert not CONTROL.search(text)
    assert "good one" not in text, "nothing of a model's"
    assert len(re.findall(r"step \d/10  reward 0.500  kl 0.0123 .* left$", text, re.M)) == 2
    assert "ALARM 60% of all. What to do: More than half of the completions are truncated for 3 steps. Raise " in text
    assert max(map(len, text.splitlines())) < 5000


def test_only_the_first_alarm_of_a_kind_says_what_to_do(logged: io.StringIO) -> None:
    display = Display(10, 0, active=True, show_completions_every=1)
    for step in (2, 7):
        display.alarms([Alarm(step, "truncated", "completion/truncated", 0.6, 0.5, f"{step}0% of all")], {"truncated"})
    first, again = logged.getvalue().splitlines()[-2:]
    assert "ALARM 20% of all. What to do: More than half of the completions are truncated" in first
    assert again.endswith("ALARM 70% of all. What to do: see the alarm of step 2")


def test_a_terminal_is_left_as_it_was_even_without_an_end(logged: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        logging.getLogger().handlers[0].setStream(terminal)  # type: ignore[attr-defined]
        os.set_blocking(leader, False)
        run_display()
        terminal.flush()
        shown = b""
        while True:
            try:
                shown += os.read(leader, 65536)
            except BlockingIOError:
                break
    os.close(leader)
    text = shown.decode()
    assert "good one" in text and "step 2/10" in text and "ALARM 60%" in text
    assert "\x1b[?1049h" not in text, "the normal screen"
    hidden = [match.end() for match in re.finditer(r"\x1b\[\?25l", text)]
    assert all(text[end:].startswith("\x1b[?25h") or "\x1b[?25h" in text[end : end + 20] for end in hidden)
    assert "\x1b[2J" not in text and "\x1b]0;" not in text and "\u202e" not in text
