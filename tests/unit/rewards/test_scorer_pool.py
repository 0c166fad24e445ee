"""The scoring pool, with real processes: every way in which a reward can go wrong, and what becomes of the others."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grpo_dist.config.schema import RewardConfig, ScoringConfig
from grpo_dist.rewards.pool.pool import ScorerPool
from grpo_dist.rewards.pool.process import worker_environment
from grpo_dist.rewards.registry import TrainerState, labels, resolve
from grpo_dist.rewards.scores import Item, Scores, combine

REWARDS = '''
"""A user's module. A completion says what is to happen to it."""

import asyncio, ctypes, os, re, signal, subprocess, sys

from grpo_dist.rewards.placement import runs_in


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def act(completions, **columns):
    """Do as each completion says; a plain number is the reward."""
    return [one(completion) for completion in completions]


def one(text):
    if text == "raise":
        raise RuntimeError("this one is bad")
    if text == "exit":
        sys.exit(3)
    if text == "die":
        os._exit(7)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "hang":
        while True:
            pass
    if text == "hang in C":
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        re.fullmatch("(a*)*b", "a" * 64)
    if text == "hang in a child":
        subprocess.run(["sleep", "98765"])
    if text == "print":
        print("printed by a reward", flush=True)
        os.write(1, b"written by a reward")
        sys.stdin.read()
    return float(text) if text.replace(".", "").isdigit() else 0.0


async def later(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)


def coroutine(completions):
    return later(completions)


def forgets_to_await(completions):
    return [later(completions) for _ in completions]


def seen(prompts, completions, completion_ids, answer, level=None, factor=1):
    """Prove what arrives; raises where it is anything else."""
    for prompt, completion, ids, gold, this in zip(prompts, completions, completion_ids, answer, level):
        if isinstance(prompt, list):
            assert completion == [{"role": "assistant", "content": gold}], completion
        else:
            assert completion == gold and ids == [len(gold)], (completion, ids)
        assert this in (None, "hard")
    return [factor * len(gold) for gold in answer]


class Counter:
    def __init__(self, start):
        self.start = start

    def __call__(self, completion_ids):
        return [self.start + len(ids) for ids in completion_ids]


def secrets(completions):
    assert not {"HF_TOKEN", "MY_API_KEY", "db_password", "RANK", "MASTER_ADDR"} & set(os.environ)
    assert os.environ["OMP_NUM_THREADS"] == "1" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert "torch" not in sys.modules and "grpo_dist.types" not in sys.modules
    return [1.0] * len(completions)


def process(completions):
    return [float(os.getpid())] * len(completions)


def logs(completions, trainer_state, log_metric, log_extra):
    log_metric("share_long", sum(len(text) > 1 for text in completions) / len(completions))
    log_extra("first", [text[0] if text != "d" else "half \\ud83d" for text in completions])
    return [float(trainer_state.global_step)] * len(completions)


def logs_badly(completions, log_extra):
    log_extra("first", [1])
    return [1.0] * len(completions)


CALLS = []


def compares(completions, log_metric):
    """Whether each is the shortest of its call; raises for a bad one, hangs for another."""
    CALLS.append(len(completions))
    log_metric("calls", len(CALLS))
    [one(text) for text in completions if text in ("raise", "hang")]
    return [float(len(text) == min(map(len, completions))) for text in completions]


def one_value(completions):
    return [1.0]


def scalar_for_several(completions):
    return [1.0] if len(completions) == 1 else 1.0


def dict_for_several(completions):
    return [1.0] if len(completions) == 1 else {text: 1.0 for text in completions}


def without_duplicates(completions):
    return [1.0 for _ in set(completions)]


def for_one_alone(completions):
    (text,) = completions
    return [1.0]


FLAKY = []


def flaky(completions):
    FLAKY.append(1)
    if len(FLAKY) == 1:
        raise ConnectionError("busy")
    return [float(len(text) == min(map(len, completions))) for text in completions]


@runs_in("worker", most_items=3)
def in_threes(completions):
    return [float(len(completions))] * len(completions)


def takes_text(completions):
    return [float(completion.strip() == "a") for completion in completions]

def some_fail(completions):
    return [RuntimeError("no answer") if text == "bad" else 1.0 for text in completions]


def takes_a_name(completions, log_metric):
    log_metric("mean", 7.0)
    return [1.0] * len(completions)


@runs_in("single")
def alone(completions, log_metric):
    log_metric("count", len(completions))
    return [float(os.getpid())] * len(completions)


@runs_in("main")
def at_home(completions):
    return [float(os.getpid())] * len(completions)


@runs_in("gpu")
def on_gpu(completions):
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5" and os.environ["OMP_NUM_THREADS"] == "3"
    return [1.0] * len(completions)


def needs_key(completions):
    assert os.environ["MY_API_KEY"] == "1" and "HF_TOKEN" not in os.environ
    return [1.0] * len(completions)


KEPT = []


def leaks(completions):
    KEPT.append(bytearray(os.urandom(1)) * 40_000_000 * len(completions))
    return [float(os.getpid())] * len(completions)


def greedy(completions):
    return [float(len(bytearray(1 << 36)))] * len(completions)


not_callable = 3


def no_completions(prompts): ...


def positional(completions, /): ...
'''
NUMPY_REWARDS = """
import numpy as np

VALUES = {
    "none": None, "true": True, "int": 3, "zero_dim": np.array(2.5), "float32": np.float32(0.5),
    "nan": float("nan"), "inf": float("inf"), "text": "1.0", "huge": 10**400, "large": -1e31, "complex": 1j,
    "list": [1.0, 2.0],
    "per_token": [0.5, None, 1.0],
}
RESULTS = {
    "scalar": 1.0, "nothing": None, "text": "1", "dict": {"a": 1.0}, "short": [], "long": [1.0, 2.0],
    "zero_dim": np.array(1.0), "two_dims": np.ones((1, 2)), "array": np.array([4.0]), "tuple": (4,),
    "generator": (value for value in [4.0]),
}


def value(completions):
    return [VALUES[completion] for completion in completions]


def result(completions):
    return RESULTS[completions[0]]
"""
TIMEOUT_SECONDS = 0.5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current directory with the user's module in it, and an environment with secrets."""
    path = tmp_path_factory.mktemp("user")
    (path / "user_rewards.py").write_text(REWARDS)
    (path / "numpy_rewards.py").write_text(NUMPY_REWARDS)
    (path / "broken_rewards.py").write_text("import os\nimport no_such_package\n")
    (path / "exiting_rewards.py").write_text("raise SystemExit('usage: …')\n")
    (path / "dying_rewards.py").write_text("import os\nos._exit(5)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name in ("HF_TOKEN", "MY_API_KEY", "db_password", "RANK", "MASTER_ADDR"):
            patch.setenv(name, "1")
        yield path


@pytest.fixture(scope="module")
def pools(directory: Path) -> Iterator[Callable[[str], ScorerPool]]:
    """One pool per reward that a test asks for, kept for the module: `pools("act")`."""
    kept: dict[str, ScorerPool] = {}

    def get(name: str) -> ScorerPool:
        if name not in kept:
            module = "numpy_rewards" if name in ("value", "result") else "user_rewards"
            config = RewardConfig(f"{module}:{name}", args={"factor": 2} if name == "seen" else {})
            quick = ScoringConfig(num_workers=2, timeout_seconds=TIMEOUT_SECONDS)
            kept[name] = ScorerPool([config], quick if name == "act" else ScoringConfig(num_workers=1))
        return kept[name]

    yield get
    for pool in kept.values():
        pool.close()


def items(*texts: str) -> list[Item]:
    return [Item(prompt="?", completion=text, completion_ids=[len(text)]) for text in texts]


def command_lines() -> list[bytes]:
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while we look
            lines.append((process / "cmdline").read_bytes())
    return lines


def kinds(scores: Scores) -> list[tuple[int, str]]:
    assert scores.failed.sum() == len(scores.failures)
    assert np.isnan(scores.values[scores.failed]).all()
    return [(failure.item, failure.kind) for failure in scores.failures]


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


def test_children_of_a_hung_reward_end_with_it(pools: Callable[[str], ScorerPool]) -> None:
    assert kinds(pools("act").score(items("hang in a child"))) == [(0, "timeout")]
    deadline = time.monotonic() + 5  # whoever inherits the dead child may take a moment to bury it
    while b"sleep\0" + b"98765\0" in command_lines():
        assert time.monotonic() < deadline, "the child of a killed worker lives on"
        time.sleep(0.01)


def test_a_reward_that_always_hangs_is_given_up(pools: Callable[[str], ScorerPool]) -> None:
    begun = time.monotonic()
    scores = pools("act").score(items(*["hang"] * 40))
    assert time.monotonic() - begun < 12 * TIMEOUT_SECONDS + 5, "40 calls at 0.5 s on two workers take 10 s and starts"
    assert len(scores.failures) == 40
    assert sum("not tried" in failure.message for failure in scores.failures) >= 30


def test_prints_do_not_reach_the_results(pools: Callable[[str], ScorerPool], capfd: pytest.CaptureFixture[str]) -> None:
    assert pools("act").score(items("print", "4")).values.tolist() == [[0.0], [4.0]]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "expected"), [("none", None), ("true", 1.0), ("int", 3.0), ("zero_dim", 2.5), ("float32", 0.5)]
)
def test_values_that_are_rewards(pools: Callable[[str], ScorerPool], text: str, expected: float | None) -> None:
    scores = pools("value").score(items(text))
    assert scores.failures == [] and not scores.failed.any()
    assert math.isnan(scores.values[0, 0]) if expected is None else scores.values[0, 0] == expected


@pytest.mark.parametrize("text", ["nan", "inf", "text", "huge", "large", "complex", "list"])
def test_values_that_are_none(pools: Callable[[str], ScorerPool], text: str) -> None:
    scores = pools("value").score(items("int", text, "none"))
    assert kinds(scores) == [(1, "bad_value")]
    assert scores.failures[0].message.startswith("returned ")
    assert scores.values[0, 0] == 3


def test_one_number_per_token(pools: Callable[[str], ScorerPool]) -> None:
    long = Item(prompt="?", completion="per_token", completion_ids=[1, 2, 3])
    scores = pools("value").score([long, *items("int", "list")])
    assert scores.values[:2, 0].tolist() == [1.5, 3.0]
    assert list(scores.per_token) == [(0, 0)]
    first, second, third = scores.per_token[0, 0]
    assert (first, third) == (0.5, 1.0) and math.isnan(second)
    assert scores.failures[0].message == "returned 2 numbers for 1 tokens, expected one per token"


@pytest.mark.parametrize("text", ["array", "tuple", "generator"])
def test_results_that_are_lists(pools: Callable[[str], ScorerPool], text: str) -> None:
    assert pools("result").score(items(text)).values.tolist() == [[4.0]]


@pytest.mark.parametrize("text", ["scalar", "nothing", "text", "dict", "short", "long", "zero_dim", "two_dims"])
def test_results_that_are_not(pools: Callable[[str], ScorerPool], text: str) -> None:
    scores = pools("result").score(items(text))
    assert kinds(scores) == [(0, "bad_value")]


def test_asynchronous_functions(pools: Callable[[str], ScorerPool]) -> None:
    assert pools("later").score(items("a", "b")).values.tolist() == [[1.0], [1.0]]
    assert pools("coroutine").score(items("a", "b")).values.tolist() == [[1.0], [1.0]]
    assert kinds(pools("forgets_to_await").score(items("a"))) == [(0, "bad_value")]


def test_columns_prompts_and_arguments_arrive_as_in_trl(pools: Callable[[str], ScorerPool]) -> None:
    given = [
        Item("text", "abc", [3], {"answer": "abc", "unwanted": 1}),
        Item([{"role": "user", "content": "text"}], "abcd", [4], {"answer": "abcd", "level": "hard"}),
    ]
    assert pools("seen").score(given).values.tolist() == [[6.0], [8.0]]
    with pytest.raises(
        ValueError, match=r"'user_rewards:seen' needs the argument\(s\) answer.*columns of the data.*mean 'answers'"
    ):
        pools("seen").submit([Item("?", "a", [1], {"answers": 1})])


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


def test_closing_ends_workers_and_waiters(directory: Path) -> None:
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


def test_workers_die_with_their_parent(directory: Path) -> None:
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig("mth"), "'mth' is not a built-in reward; did you mean 'math'"),
        (RewardConfig("math", args={"corect_reward": 1}), "unexpected keyword argument 'corect_reward'"),
        (RewardConfig("math", args={"correct_reward": "much"}), "could not convert string to float"),
        (RewardConfig("no_such_module:f"), "'no_such_module' failed with ModuleNotFoundError"),
        (RewardConfig("user_rewards.py:act"), "write user_rewards:act"),
        (RewardConfig("trl.rewards.own"), "module:function, such as trl.rewards:own"),
        (RewardConfig("some/reward-model"), "{name: reward_model, args: {model: some/reward-model}}"),
        (RewardConfig("user_rewards:"), "expected module:function"),
        (RewardConfig("user_rewards:lenght"), "did you mean 'length'"),
        (RewardConfig("user_rewards:not_callable"), "of type int, which cannot be called"),
        (RewardConfig("user_rewards:no_completions"), r"the signature \(prompts\); expected one"),
        (RewardConfig("user_rewards:positional"), r"the signature \(completions, /\); expected one"),
        (RewardConfig("user_rewards:seen", args={"factr": 2}), "did you mean 'factor'"),
        (RewardConfig("user_rewards:seen", args={"completions": 2}), "which every call fills in"),
        (RewardConfig("user_rewards:Counter"), "missing 1 required positional argument: 'start'"),
        (RewardConfig("broken_rewards:f"), r"No module named 'no_such_package' \(.*broken_rewards.py, line 2\)"),
        (RewardConfig("exiting_rewards:f"), "SystemExit: usage"),
    ],
)
def test_a_mistake_in_a_reward_is_said_at_once(directory: Path, config: RewardConfig, message: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        with pytest.raises(ValueError, match=message):
            resolve(config)


def test_a_file_with_nearly_the_name_of_a_module_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    with pytest.raises(ValueError, match=r"and from the Python path; near it: user_rewards\.py"):
        resolve(RewardConfig("user_reward:seen"))


def test_the_pool_says_so_too(directory: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'length'"):
        ScorerPool([RewardConfig("user_rewards:lenght")], ScoringConfig())
    with pytest.raises(ValueError, match=r"exited with code 5 while it imported the rewards \['dying_rewards:f'\]"):
        ScorerPool([RewardConfig("dying_rewards:f")], ScoringConfig(num_workers=1))


def test_classes_and_arguments(directory: Path) -> None:
    rewards = [
        RewardConfig("user_rewards:Counter", args={"start": 10}),
        RewardConfig("math", args={"correct_reward": 5, "wrong_reward": -1}),
    ]
    with ScorerPool(rewards, ScoringConfig(num_workers=1)) as pool:
        given = [Item("?", "it is 7", [1, 2], {"answer": "7"}), Item("?", "8", [1], {"answer": 7})]
        assert pool.score(given).values.tolist() == [[12.0, 5.0], [11.0, -1.0]]
        pool.check_columns(["answer"])
        with pytest.raises(ValueError, match="'math' needs the argument"):
            pool.check_columns([])


def test_labels_are_short_and_unique() -> None:
    names = ["math", "a.b:f", "c:f", "c:Class.method", "math"]
    assert labels([RewardConfig(name) for name in names]) == ["math", "f", "f_2", "method", "math_2"]


def test_combine_tells_failed_from_does_not_apply() -> None:
    nan = np.nan
    values = np.array([[1.0, 2.0], [nan, 2.0], [1.0, nan], [nan, nan], [nan, 2.0]])
    failed = np.array([[False, False], [False, False], [False, True], [False, False], [True, False]])
    np.testing.assert_array_equal(combine(values, failed, [1.0, 0.5]), [2.0, 1.0, nan, nan, nan])
    np.testing.assert_array_equal(combine(values, failed, [1.0, 0.0]), [1.0, nan, 1.0, nan, nan])
    with pytest.raises(ValueError, match="1 weights given, expected"):
        combine(values, failed, [1.0])


def test_what_rewards_log_reaches_metrics_and_table(directory: Path) -> None:
    with ScorerPool([RewardConfig("user_rewards:logs")], ScoringConfig(num_workers=2)) as pool:
        scores = pool.score(items("a", "bb", "cc", "d", "ee"), TrainerState(global_step=7))
    assert scores.values[:, 0].tolist() == [7.0] * 5 and scores.names == ["logs"]
    total, count = scores.metrics["logs/share_long"]
    assert count == 5 and total == pytest.approx(3), "weighted by completions, whatever the chunks"
    assert scores.extras == {"logs/first": ["a", "b", "c", "half ?", "e"]}


@pytest.mark.parametrize("faulty", ["raise", "hang"])
def test_a_call_made_again_still_compares(directory: Path, faulty: str, caplog: pytest.LogCaptureFixture) -> None:
    quick = ScoringConfig(num_workers=2, timeout_seconds=TIMEOUT_SECONDS)
    with ScorerPool([RewardConfig("user_rewards:compares")], quick) as pool:
        scores = pool.score(items("aaa", faulty, "a", "aa"), groups=[0] * 4)
    assert [failure.item for failure in scores.failures] == [1]
    assert scores.values[[0, 2, 3], 0].tolist() == [0.0, 1.0, 0.0], "among those that can be scored, not each alone"
    assert scores.repeated_calls == [1] and scores.metrics["compares/calls"][1] == 3
    assert "compares failed when it was called with 4 completions" in caplog.text
    assert "1 of which it cannot score alone" in caplog.text


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("one_value", "bad_value", "returned 1 values for 4 completions: [1.0] (list)"),
        ("scalar_for_several", "bad_value", "returned 1.0 (float), expected a list of 4 floats or Nones"),
        ("dict_for_several", "bad_value", "(dict), expected a list of 4 floats or Nones"),
        ("without_duplicates", "bad_value", "returned 3 values for 4 completions: [1.0, 1.0, 1.0] (list)"),
        ("for_one_alone", "raised", "ValueError: too many values to unpack"),
    ],
)
def test_what_is_right_for_one_completion_alone_is_no_success(
    directory: Path, name: str, kind: str, message: str
) -> None:
    with ScorerPool([RewardConfig(f"user_rewards:{name}")], ScoringConfig(num_workers=2)) as pool:
        scores = pool.score(items("aaa", "a", "a", "bbbb"))
    assert kinds(scores) == [(place, kind) for place in range(4)]
    assert all(message in failure.message for failure in scores.failures), scores.failures[0].message
    assert scores.repeated_calls == [0]


def test_a_passing_failure_is_counted(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScorerPool([RewardConfig("user_rewards:flaky")], ScoringConfig(num_workers=1)) as pool:
        scores = pool.score(items("aaa", "a", "aa"))
    assert scores.values[:, 0].tolist() == [0.0, 1.0, 0.0] and scores.repeated_calls == [1]
    assert "ConnectionError: busy), 0 of which it cannot score alone" in caplog.text


@pytest.mark.parametrize("num_workers", [1, 3])
def test_how_completions_are_divided_into_calls(directory: Path, num_workers: int) -> None:
    names = ("alone", "in_threes", "compares")
    rewards = [RewardConfig(f"user_rewards:{name}") for name in names]
    texts = ["aa", "a", "b", "cc", "ccc", "dddd", "ddd", "dd", "d"]
    with ScorerPool(rewards, ScoringConfig(num_workers=num_workers)) as pool:
        scores = pool.score(items(*texts), groups=[0, 0, 1, 2, 2, 3, 3, 3, 3])
    assert scores.failures == []
    assert scores.metrics["alone/count"] == (81.0, 9), "one call with every group of the rank"
    assert scores.values[:, 2].tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1], "one group a call, whatever the workers"
    if num_workers == 1:
        sizes = scores.values[:, 1].tolist()
        assert sizes == [3, 3, 3, 2, 2, 3, 3, 3, 1], "groups are kept where they fit and divided where they do not"


def test_bad_logs_and_single_failures(pools: Callable[[str], ScorerPool]) -> None:
    scores = pools("logs_badly").score(items("a", "b"))
    assert [failure.message for failure in scores.failures] == ["logged 1 values as 'first' for 2 completions"] * 2
    assert scores.extras == {} and scores.repeated_calls == [0]
    scores = pools("takes_a_name").score(items("a"))
    assert scores.failures[0].message.startswith("logged a metric 'mean', which the trainer logs by itself")
    scores = pools("some_fail").score(items("a", "bad", "c"))
    assert kinds(scores) == [(1, "raised")] and scores.failures[0].message == "RuntimeError: no answer"
    assert scores.values[[0, 2], 0].tolist() == [1.0, 1.0]


def test_a_completion_of_a_conversation_is_no_text(pools: Callable[[str], ScorerPool]) -> None:
    (item,) = items("a")
    assert pools("takes_text").score([item]).values.tolist() == [[1.0]]
    (failure,) = pools("takes_text").score([replace(item, prompt=[{"role": "user", "content": "?"}])]).failures
    assert failure.message == (
        "AttributeError: 'list' object has no attribute 'strip'. The prompts are conversations, so each completion is "
        "a list of messages: its text is completion[-1]['content']"
    )


def test_rewards_run_where_they_declare_to(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_secret_reaches_only_the_reward_that_names_it(directory: Path) -> None:
    rewards = [RewardConfig("user_rewards:needs_key", environment=["MY_API_KEY"]), RewardConfig("user_rewards:secrets")]
    with ScorerPool(rewards, ScoringConfig(num_workers=1)) as pool:
        assert pool.score(items("a")).failures == []
    with pytest.raises(ValueError, match=r"rewards\.environment names NO_SUCH_KEY, which this process does not have"):
        ScorerPool([RewardConfig("math", environment=["NO_SUCH_KEY"])], ScoringConfig(num_workers=1))


def test_leaks_end_with_their_worker_and_memory_is_bounded(directory: Path) -> None:
    scoring = ScoringConfig(num_workers=1, recycle_above_gib=0.15, memory_limit_gib=4)
    rewards = [RewardConfig("user_rewards:leaks"), RewardConfig("user_rewards:greedy")]
    with ScorerPool(rewards, scoring) as pool:
        workers = [pool.score(items("a")).values[0, 0] for _ in range(8)]
        scores = pool.score(items("a"))
    assert 2 <= len(set(workers)) <= 4, workers
    assert kinds(scores) == [(0, "raised")] and scores.failures[0].message == "MemoryError"


def test_own_time_limits_and_weights_over_steps(directory: Path) -> None:
    with ScorerPool([RewardConfig("user_rewards:act", timeout_seconds=0.3)], ScoringConfig(num_workers=1)) as pool:
        assert "rewards.timeout_seconds = 0.3" in pool.score(items("hang")).failures[0].message
    scheduled = RewardConfig(weight=2.0, schedule={10: 1.0, 20: 0.0})
    assert [scheduled.weight_at(step) for step in (0, 10, 15, 20, 99)] == [2.0, 2.0, 1.0, 0.0, 0.0]
    assert RewardConfig(weight=2.0).weight_at(5) == 2.0
    with pytest.raises(ValueError, match=r"rewards\.schedule"):
        RewardConfig(schedule={})
