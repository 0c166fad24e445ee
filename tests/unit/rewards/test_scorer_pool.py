"""The scoring pool, with real processes: every way in which a reward can go wrong, and what becomes of the others."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from scoring import TIMEOUT_SECONDS, items, kinds

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.pool import channel
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.pool.process import worker_environment


def command_lines() -> list[bytes]:
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while we look
            lines.append((process / "cmdline").read_bytes())
    return lines


def test_results_come_in_order_whatever_the_chunks(pools: Callable[[str], ScorerPool]) -> None:
    texts = [str(n % 97) for n in range(501)]
    scores = pools("act").score(items(*texts))
    assert scores.values[:, 0].tolist() == [float(text) for text in texts]
    assert scores.failures == [] and scores.seconds[0] > 0
    assert pools("act").score([]).values.shape == (0, 1)


def test_only_the_guilty_stay_unscored(pools: Callable[[str], ScorerPool]) -> None:
    texts = [str(n) for n in range(40)]
    faulty = {3: "raise", 9: "exit", 12: "die", 15: "segfault", 20: "hang", 31: "hang in C"}
    for place, text in faulty.items():
        texts[place] = text
    scores = pools("act").score(items(*texts))
    assert kinds(scores) == [(3, "raised"), (9, "raised"), (12, "died"), (15, "died"), (20, "timeout"), (31, "timeout")]
    assert all(scores.values[n, 0] == n for n in range(40) if n not in faulty)
    messages = {failure.item: failure.message for failure in scores.failures}
    assert messages[3] == "RuntimeError: this one is bad"
    assert "in one\n" in scores.failures[0].traceback
    assert messages[12] == "ended its worker process (exit code 7)"
    assert messages[15] == f"ended its worker process (exit code -{signal.SIGSEGV:d})"
    assert scores.repeated_calls == [1]
    assert messages[20] == "took longer than scoring.timeout_seconds = 0.5"
    assert pools("act").score(items("5")).values.tolist() == [[5.0]]


@pytest.mark.parametrize(
    ("text", "kind", "seconds"),
    [("hang in a child", "timeout", 98765), ("hang in a session", "timeout", 98764),
     ("die and leave a session", "died", 98763)],
)  # fmt: skip
def test_children_of_a_reward_end_with_its_worker(
    text: str, kind: str, seconds: int, pools: Callable[[str], ScorerPool]
) -> None:
    assert kinds(pools("act").score(items(text))) == [(0, kind)]
    deadline = time.monotonic() + 5  # whoever inherits the dead child may take a moment to bury it
    while f"sleep\0{seconds}\0".encode() in command_lines():
        assert time.monotonic() < deadline, "the child of a killed worker lives on"
        time.sleep(0.01)


def test_time_in_which_the_trainer_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and fg, or a container that pauses, which stops the workers as well: their answers come late."""
    clock = [0.0]
    monkeypatch.setattr(channel, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def answering(*waits: float) -> channel.Channel:
        """A channel whose answer comes after waits of so many seconds."""
        parts: list[float | bytes] = [*waits, b"\0\0\0\0\0\0\0\2", b"ok"]

        def receive(count: int) -> bytes:
            part = parts.pop(0)
            if isinstance(part, bytes):
                return part
            clock[0] += part
            raise TimeoutError

        return channel.Channel(SimpleNamespace(settimeout=lambda seconds: None, recv=receive))  # type: ignore[arg-type]

    assert answering(1.0, 600.0, 1.0).receive(10.0) == b"ok"
    assert answering(*[1.0] * 9).receive(10.0) == b"ok"
    with pytest.raises(TimeoutError):
        answering(*[1.0] * 10).receive(10.0)


@pytest.mark.parametrize("limited", ["processes", "files", "threads"])
def test_a_limit_of_the_system_is_named(limited: str, user_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen, start, started, calls = subprocess.Popen, threading.Thread.start, [], itertools.count()

    def refuse(*arguments: object, **options: object) -> object:
        if next(calls) == 2:
            if limited == "threads":
                raise RuntimeError("can't start new thread")
            raise OSError({"processes": errno.EAGAIN, "files": errno.EMFILE}[limited], "no more")
        made = start(*arguments) if limited == "threads" else popen(*arguments, **options)  # type: ignore[call-overload]
        started.append(made)
        return made

    place = (threading.Thread, "start") if limited == "threads" else (subprocess, "Popen")
    monkeypatch.setattr(*place, refuse)
    with pytest.raises(ValueError, match=r"a worker process cannot be started.*ulimit -u.*lower scoring\.num_workers"):
        ScorerPool([RewardConfig("user_rewards:act")], ScoringConfig(num_workers=3))
    assert limited == "threads" or all(worker.returncode is not None for worker in started)


def test_a_reward_that_always_hangs_is_given_up(pools: Callable[[str], ScorerPool]) -> None:
    begun = time.monotonic()
    scores = pools("act").score(items(*["hang"] * 40))
    assert time.monotonic() - begun < 12 * TIMEOUT_SECONDS + 5, "40 calls at 0.5 s on two workers take 10 s and starts"
    assert len(scores.failures) == 40
    assert sum("not tried" in failure.message for failure in scores.failures) >= 30


def test_prints_do_not_reach_the_results(pools: Callable[[str], ScorerPool], capfd: pytest.CaptureFixture[str]) -> None:
    assert pools("act").score(items("print", "4")).values.tolist() == [[0.0], [4.0]]
    assert capfd.readouterr().out == ""


def test_workers_are_light_and_know_no_secrets(pools: Callable[[str], ScorerPool]) -> None:
    assert pools("secrets").score(items("a")).failures == []
    kept = worker_environment(
        {"HOME": "/h", "HF_TOKEN": "t", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "1", "LANG": "C"}
    )
    assert kept["PYTHONHASHSEED"] == "0" and worker_environment({"PYTHONHASHSEED": "7"})["PYTHONHASHSEED"] == "7"
    assert {"HOME", "LANG"} < set(kept) and not {"HF_TOKEN", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & set(kept)


def test_scoring_runs_while_the_caller_goes_on(pools: Callable[[str], ScorerPool]) -> None:
    begun = time.monotonic()
    pending = pools("act").submit(items("hang"))
    later = pools("act").submit(items("6"))
    assert time.monotonic() - begun < TIMEOUT_SECONDS / 2
    assert later.result().values.tolist() == [[6.0]]
    assert kinds(pending.result()) == [(0, "timeout")]


def test_signals_are_left_to_the_parent(pools: Callable[[str], ScorerPool]) -> None:
    before = set(pools("process").score(items(*"abcdefgh")).values[:, 0].tolist())
    for process in before:
        assert os.getpgid(int(process)) == int(process)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(int(process), number)
    after = pools("process").score(items(*"abcdefgh"))
    assert after.failures == [] and set(after.values[:, 0].tolist()) & before


def test_closing_ends_workers_and_waiters(user_directory: Path) -> None:
    rewards = [RewardConfig("user_rewards:act"), RewardConfig("user_rewards:process"), RewardConfig("user_rewards:act")]
    with ScorerPool(rewards, ScoringConfig(num_workers=1)) as pool:
        assert pool.names == ["act", "process", "act_2"]
        worker = int(pool.score(items("1")).values[0, 1])
        waiting, behind = pool.submit(items("hang")), pool.submit(items("1"))
        time.sleep(0.1)
    for pending in (waiting, behind):
        with pytest.raises(RuntimeError, match="closed"):
            pending.result()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(items("1"))
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_workers_die_with_their_parent(user_directory: Path) -> None:
    program = (
        "from grpo_dist.config.schema import *; from grpo_dist.rewards.pool.pool import *; import os, signal, time\n"
        "from grpo_dist.rewards.scores import Item\n"
        "rewards = [RewardConfig('user_rewards:process'), RewardConfig('user_rewards:act')]\n"
        "pool = ScorerPool(rewards, ScoringConfig(num_workers=1))\n"
        "print(int(pool.score([Item('?', 'print', [])]).values[0, 0]), flush=True)\n"
        "pool.submit([Item('?', 'hang', [])]); time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "printed by a reward\nwritten by a reward" in done.stderr
    worker, deadline = Path(f"/proc/{int(done.stdout)}"), time.monotonic() + 5
    while worker.exists() and "Z" not in (worker / "stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.01)


def test_rewards_run_where_they_declare_to(user_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    names = ("process", "alone", "at_home", "on_gpu")
    rewards = [RewardConfig(f"user_rewards:{name}") for name in names]
    with ScorerPool(rewards, ScoringConfig(num_workers=1)) as pool:
        scores = pool.score(items(*"abcdefgh"))
    assert scores.failures == []
    assert len(set(scores.values[0, :3])) == 3 and scores.values[0, 2] == os.getpid()
    assert scores.metrics["alone/count"] == (64.0, 8), "one call with all completions"


def test_a_secret_reaches_only_the_reward_that_names_it(user_directory: Path) -> None:
    rewards = [RewardConfig("user_rewards:needs_key", environment=["MY_API_KEY"]), RewardConfig("user_rewards:secrets")]
    with ScorerPool(rewards, ScoringConfig(num_workers=1)) as pool:
        assert pool.score(items("a")).failures == []
    with pytest.raises(ValueError, match=r"rewards\.environment names NO_SUCH_KEY, which this process does not have"):
        ScorerPool([RewardConfig("math", environment=["NO_SUCH_KEY"])], ScoringConfig(num_workers=1))


def test_leaks_end_with_their_worker_and_memory_is_bounded(user_directory: Path) -> None:
    scoring = ScoringConfig(num_workers=1, recycle_above_gib=0.15, memory_limit_gib=4)
    rewards = [RewardConfig("user_rewards:leaks"), RewardConfig("user_rewards:greedy")]
    with ScorerPool(rewards, scoring) as pool:
        workers = [pool.score(items("a")).values[0, 0] for _ in range(8)]
        scores = pool.score(items("a"))
    assert 2 <= len(set(workers)) <= 4, workers
    assert kinds(scores) == [(0, "raised")] and scores.failures[0].message == "MemoryError"


def test_own_time_limits_and_weights_over_steps(user_directory: Path) -> None:
    with ScorerPool([RewardConfig("user_rewards:act", timeout_seconds=0.3)], ScoringConfig(num_workers=1)) as pool:
        assert "rewards.timeout_seconds = 0.3" in pool.score(items("hang")).failures[0].message
    scheduled = RewardConfig(weight=2.0, schedule={10: 1.0, 20: 0.0})
    assert [scheduled.weight_at(step) for step in (0, 10, 15, 20, 99)] == [2.0, 2.0, 1.0, 0.0, 0.0]
    assert RewardConfig(weight=2.0).weight_at(5) == 2.0
    with pytest.raises(ValueError, match=r"rewards\.schedule"):
        RewardConfig(schedule={})
