"""A user's module. A completion says what is to happen to it."""

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import sys

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
    if text == "hang in a session":
        subprocess.run(["sleep", "98764"], start_new_session=True)
    if text == "die and leave a session":
        subprocess.Popen(["sleep", "98763"], start_new_session=True)
        os._exit(7)
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
    for prompt, completion, ids, gold, this in zip(prompts, completions, completion_ids, answer, level, strict=True):
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
    log_extra("first", [text[0] if text != "d" else "half \ud83d" for text in completions])
    return [float(trainer_state.global_step)] * len(completions)


@runs_in("main")
def logs_at_home(completions, log_extra):
    log_extra("text", ["half \ud83d" for _ in completions])
    return [1.0] * len(completions)


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
    (_,) = completions
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
