"""The sandbox against programs that want out, one property a test, and the code reward against those that cheat."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from grpo_dist.config.schema import RewardConfig
from grpo_dist.rewards.code import CodeReward, extract_program, read_tests
from grpo_dist.rewards.registry import resolve
from grpo_dist.rewards.sandbox import Limits, Sandbox, SandboxError

ADD = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
LIMITS = Limits(seconds=2, memory_mib=256, output_bytes=100_000)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(LIMITS)
    except SandboxError as error:
        pytest.skip(f"no isolation here: {error}")


@pytest.fixture(scope="module")
def reward(sandbox: Sandbox) -> CodeReward:
    return CodeReward(seconds=2)


def processes_of(mark: str) -> list[str]:
    names = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            content = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in content:
            names.append(path.parent.name)
    return names


def wait_until_gone(mark: str) -> None:
    deadline = time.monotonic() + 5
    while processes_of(mark):
        assert time.monotonic() < deadline, f"a process of {mark} lives on"
        time.sleep(0.02)


def test_a_program_runs(sandbox: Sandbox) -> None:
    program = "import sys; print(sys.stdin.read()[::-1]); print('e', file=sys.stderr); sys.exit(3)"
    outcome = sandbox.run(program, "ab\u00fc")
    assert (outcome.ending, outcome.exit_code, outcome.stdout, outcome.stderr) == ("exited", 3, "\u00fcba\n", "e\n")


def test_signals_that_the_scoring_process_ignores_are_not_ignored(sandbox: Sandbox) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        outcome = sandbox.run(
            "import signal\n"
            "print([signal.getsignal(number).name for number in (signal.SIGTERM, signal.SIGUSR1)],"
            " callable(signal.getsignal(signal.SIGINT)))"
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert outcome.stdout == "['SIG_DFL', 'SIG_DFL'] True\n", outcome


def test_fork_bomb(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import os, time\nwhile True:\n  try: os.fork()\n  except OSError: time.sleep(1)")
    assert outcome.ending == "timeout" and outcome.exit_code == 137
    assert Sandbox(LIMITS).run("print(1)").stdout == "1\n", "the next run has its own count"
    limited = sandbox.run(
        "import os\nfor n in range(100):\n  try:\n    if os.fork() == 0: import time; time.sleep(9)\n"
        "  except BlockingIOError: print(n, flush=True); os._exit(0)\nprint('no limit')"
    )
    assert int(limited.stdout) < LIMITS.processes


def test_memory_bomb(sandbox: Sandbox) -> None:
    outcome = sandbox.run("kept = []\nwhile True: kept.append(bytearray(1 << 24))")
    assert outcome.exit_code == 1 and "MemoryError" in outcome.stderr


def test_files_are_bounded(sandbox: Sandbox) -> None:
    outcome = sandbox.run("f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(1 << 20))")
    assert outcome.exit_code != 0
    many = "import os\nfor n in range(99):\n  open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))"
    assert "No space left" in sandbox.run(many).stderr
    assert "Too many open files" in sandbox.run("kept = [open('/dev/null') for _ in range(99)]").stderr


@pytest.mark.parametrize("loop", ["while True: pass", "import time; time.sleep(99)", "sum(range(10**12))"])
def test_endless_loops(sandbox: Sandbox, loop: str) -> None:
    begun = time.monotonic()
    assert sandbox.run(loop).ending == "timeout"
    assert time.monotonic() - begun < LIMITS.seconds + 2


def test_gigabytes_of_output(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import sys\nwhile True: sys.stdout.write('x' * 10**6)")
    assert outcome.ending == "output" and len(outcome.stdout) < 2 * LIMITS.output_bytes


def test_files_outside_are_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("gold")
    paths = [str(secret), "/etc/passwd", "/etc/shadow", "/proc/1/environ", __file__, os.path.expanduser("~/.bashrc")]
    outcome = sandbox.run(
        f"import os\nfor path in {paths!r}:\n  try: print(open(path).read())\n  except OSError: pass\n"
        "for path in ('/usr/x', '/x', os.path.dirname(os.__file__) + '/x', '/dev/x'):\n"
        "  try: open(path, 'w'); print('wrote', path)\n  except OSError: pass\n"
        "print(sorted(os.environ))"
    )
    assert outcome.stdout == "['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED']\n", outcome


def test_no_network(sandbox: Sandbox) -> None:
    outcome = sandbox.run(
        "import socket\n"
        "for address in (('127.0.0.1', 22), ('1.1.1.1', 53)):\n"
        "  try: socket.create_connection(address, 1); print('connected')\n"
        "  except OSError as error: print(error.errno)\n"
    )
    assert outcome.stdout == "101\n101\n", "network is unreachable"


def test_no_rights(sandbox: Sandbox) -> None:
    outcome = sandbox.run(
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "print(os.getuid(), os.getgid(), os.getgroups(), libc.mount(b'none', b'/tmp', b'tmpfs', 0, None),"
        " libc.chroot(b'/tmp'), libc.setuid(0), libc.sethostname(b'x', 1))"
    )
    assert outcome.stdout == "65534 65534 [] -1 -1 -1 -1\n"


def test_killing_the_parent(sandbox: Sandbox) -> None:
    outcome = sandbox.run(
        "import os, signal\n"
        "for pid in (os.getppid(), 1, -1):\n"
        "  try: os.kill(pid, signal.SIGKILL); print('sent', pid, flush=True)\n"
        "  except OSError as error: print(error.errno)\n"
        "import time; time.sleep(0.2); print('still here')"
    )
    assert outcome.ending == "exited" and outcome.stdout.endswith("still here\n"), "the guard is not to be killed"


def test_nothing_outlives_a_run(sandbox: Sandbox) -> None:
    program = (
        "import os, sys, time, ctypes\n"
        "if os.fork() == 0:\n  os.setsid(); ctypes.CDLL(None).prctl(1, 0)\n"
        "  if os.fork() == 0: os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(987654)'])\n"
        "  os._exit(0)\n"
        "time.sleep({})"
    )
    assert sandbox.run(program.format(0.3)).ending == "exited"
    wait_until_gone("987654")
    assert sandbox.run(program.format(99)).ending == "timeout"
    wait_until_gone("987654")


def test_refuses_to_start_without_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Sandbox) -> None:
        if self.isolated:
            raise SandboxError("unshare: Operation not permitted")

    monkeypatch.setattr(Sandbox, "_probe", fails)
    with pytest.raises(SandboxError, match=r"cannot be isolated here.*allow_unisolated: true"):
        Sandbox()
    with pytest.raises(ValueError, match="cannot be isolated here"):
        resolve(RewardConfig("code"))
    assert not Sandbox(allow_unisolated=True).isolated


def test_without_isolation_the_limits_hold() -> None:
    open_sandbox = Sandbox(LIMITS, allow_unisolated=True)
    open_sandbox.isolated = False
    assert open_sandbox.run("import os; print(sorted(os.environ))").stdout.startswith("['HOME'")
    assert "MemoryError" in open_sandbox.run("bytearray(1 << 34)").stderr
    assert open_sandbox.run("import os, time\nos.fork()\ntime.sleep(99)").ending == "timeout"


def test_a_broken_sandbox_is_no_verdict(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_dist.rewards.sandbox._LAUNCHER", Path("/nowhere.py"))
    with pytest.raises(SandboxError):
        sandbox.run("print(1)")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("def add(a, b): return a + b", 1.0),
        ("Text.\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0),
        ("```\nwrong\n```\n```py\ndef add(a, b):\n    return a + b", 1.0),
        ("def add(a, b): return 3", 0.0),
        ("def add(a, b): raise ValueError", 0.0),
        ("def add(a, b", 0.0),
        ("", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("import sys; sys.exit(0)", 0.0),
        ("print('passed'); print('OK'); import os; os._exit(0)", 0.0),
        # what can be reached from inside holds no verdict and no expected value
        ("import builtins\nbuiltins.repr = lambda value: 'True'\ndef add(a, b): return 0", 0.0),
        ("class Any:\n  __eq__ = lambda *_: True\n  __repr__ = lambda _: 'True'\ndef add(a, b): return Any()", 0.0),
        ("import sys\nsys.modules['json'].dumps = lambda value: '[]'\ndef add(a, b): return 0", 0.0),
        ('import sys\nfor n in range(3):\n  for v in range(9):\n    print(\'["?", %d, "%d"]\' % (n, v))', 0.0),
        ("def add(a, b): return '(' * 99999 ", 0.0),
        ("while True: pass", 0.0),
    ],
)
def test_only_programs_that_compute_it_are_right(reward: CodeReward, completion: str, expected: float) -> None:
    assert reward([completion], [ADD]) == [expected]


def test_tests_are_inputs_with_outputs_or_assertions(sandbox: Sandbox) -> None:
    reward = CodeReward(partial=True, seconds=2)
    doubles = "print(2 * int(input()))   \n"
    runs = [{"input": "2", "output": "4\n\n"}, {"input": "x", "output": "4"}, {"input": "3", "output": "7"}]
    assert reward([doubles], [runs]) == [pytest.approx(1 / 3)]
    program = "def f(x): return [x / 3, {'a': (x,)}]\ndef even(x): return x % 2 == 0"
    tests = ["assert f(1) == [0.33333333, {'a': (1,)}]", "assert even(2)", "assert not even(3)"]
    assert reward([program], [tests]) == [1.0]


@pytest.mark.parametrize(
    ("tests", "message"),
    [([], r"the answer is \[\], expected a list of at least one test"),
     ("x", "the answer is no JSON list of tests"),
     ({}, r"the answer is \{\}, expected a list"),
     ([3], "the test 3 is neither an assertion nor an object"),
     ([{"input": 1}], r"the test \{'input': 1\} is neither"),
     (["assert f("], r"the test 'assert f\(' is no Python"),
     *(([test], "is not of the form assert EXPRESSION == LITERAL")
       for test in ("assert abs(f(1) - 2) < 1", "import os", "assert f(1) == g(1)"))],
)  # fmt: skip
def test_tests_that_cannot_be_judged_are_refused(tests: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


def test_programs_are_found() -> None:
    assert extract_program("a\n```python\nx\n```\nb\n```\ny\n```") == "y\n"
    assert extract_program("no fence") == "no fence"
