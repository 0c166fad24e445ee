"""The fork server becomes the program it is asked for, and no such program harms it.

That a run of its forks is the run that fresh processes make is shown in test_invariance.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import launch
from resident import fixed, prepared_with, server_for

PROGRAM = """
import json, os, random, signal, sys
import numpy, torch
import beside

if __name__ == "__main__":
    seen = [sys.argv, os.getcwd(), os.environ.get("FAULT"), beside.__file__, torch.get_num_threads()]
    print(json.dumps([seen, [random.random(), numpy.random.rand(), torch.rand(1).item()]]))
    print("words", file=sys.stderr)
    exec(sys.argv[1])
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """A script with a module beside it."""
    (tmp_path / "beside.py").touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    return [str(tmp_path / "program.py")]


def test_it_is_the_program_that_was_asked_for(program: list[str], tmp_path: Path) -> None:
    runs = [
        launch(None, 1, "pass", "--word", program=program, directory=tmp_path, environment={"FAULT": "no"}, fresh=fresh)
        for fresh in (True, False, False)
    ]
    # whatever Triton's bindings say of themselves at the end of a process comes after it
    assert all(run.returncode == 0 and run.stderr.startswith("words\n") for run in runs), runs
    (fresh, *forked), drawn = zip(*(json.loads(run.stdout) for run in runs), strict=True)
    assert fresh[1:3] == [str(tmp_path), "no"] and forked == [fresh, fresh]
    assert all(len(set(numbers)) == 3 for numbers in zip(*drawn, strict=True)), "two processes have the same generator"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(3)", 3), ("sys.exit('in words')", 1), ("raise OSError", 1), ("os._exit(4)", 4),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
    ],
)  # fmt: skip
def test_it_ends_as_it_would_have(code: str, status: int, program: list[str]) -> None:
    done = launch(None, 1, code, program=program)
    assert done.returncode == status
    assert ("Traceback" in done.stderr and "OSError" in done.stderr) == (code == "raise OSError")


def test_a_program_that_takes_too_long_is_killed(program: list[str]) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        launch(None, 1, "signal.pause()", program=program, timeout_seconds=1)
    assert launch(None, 1, "pass", program=program).returncode == 0


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="no run here is a fork")
def test_a_variable_that_libraries_read_needs_a_process_of_its_own() -> None:
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    changed = set(fixed(variables).items()) ^ set(prepared_with().items())
    assert not changed, "an earlier test has changed a variable"
    assert server_for(variables | {"PYTHONPATH": "/tmp"}) is not None
    assert server_for(variables | {"HF_HUB_DISABLE_TELEMETRY": "1"}) is None


def test_the_hubs_variables_are_read_again(program: list[str], tmp_path: Path) -> None:
    code = "from huggingface_hub import constants as c, hf_api as h; print(c.HF_HUB_OFFLINE, c.HF_HOME, h.api.endpoint)"
    given = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://hub"}
    outputs = [launch(None, 1, code, program=program, environment=each).stdout for each in (given, {})]
    assert outputs[0].endswith(f"True {tmp_path} http://hub\n") and outputs[1].endswith("huggingface.co\n")
