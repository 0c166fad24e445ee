"""How processes begin and end, each shown by one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CYCLE = "lasting = []; lasting.append(lasting)"


def run(code: str) -> subprocess.CompletedProcess[str]:
    program = f"import atexit, gc, os, sys, threading, time\nfrom grpo_dist.distributed import process\n{code}"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=buffered,
                          timeout=60, check=False)  # fmt: skip


def test_an_end_does_all_that_pythons_own_does_but_to_clear_modules() -> None:
    done = run("""
class Loud:
    def __del__(self):
        print("cleared")

def late():
    time.sleep(0.2)
    print("thread")

loud = Loud()
atexit.register(lambda: print("first registered"))
atexit.register(lambda: print("last registered"))
threading.Thread(target=late).start()
print("program")
process.end(3)
""")
    assert done.stdout.split("\n") == ["program", "thread", "last registered", "first registered", ""], done.stderr
    assert (done.returncode, done.stderr) == (3, "")


def test_an_output_that_nobody_reads_any_more_ends_a_program_in_silence() -> None:
    """With the exit status of a shell for SIGPIPE."""
    done = run("""
read, write = os.pipe()
os.dup2(write, 1)
os.close(read)
print("lost")
process.end(0)
""")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_an_output_that_cannot_be_written_is_said_as_python_says_it() -> None:
    done = run("""
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
print("lost")
process.end(0)
""")
    assert done.returncode == 120 and "No space left" in done.stderr


INSIDE = """
import os, subprocess, sys
from grpo_dist.distributed import process
process.open_streams()
with open(sys.argv[1], "w") as file:
    print("printed")
    print("printed", file=sys.stderr)
    os.write(1, b"by a library")
    subprocess.run(["true"], stdout=2, check=True)
    file.write(str(file.fileno()))
process.end(0)
"""


@pytest.mark.parametrize("closed", [(1,), (1, 2), (0, 1, 2)])
def test_streams_that_are_closed_are_opened(closed: tuple[int, ...], tmp_path: Path) -> None:
    """Else the next file is the standard output of every library, and processes that are started have none."""
    words = [sys.executable, "-c", INSIDE, str(tmp_path / "file")]
    outside = f"import os; [os.close(each) for each in {closed}]; os.execv({words[0]!r}, {words!r})"
    done = subprocess.run([sys.executable, "-c", outside], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0 and int((tmp_path / "file").read_text()) > 2


def test_a_character_that_the_locale_lacks_is_printed_as_its_escape() -> None:
    program = "from grpo_dist.distributed import process; process.open_streams(); print('3 × 4 …')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT, timeout=60, check=False,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"3 \\xd7 4 \\u2026\n"), done.stderr


def test_a_program_without_an_output_ends() -> None:
    assert run("sys.stdout = None\nprocess.end(4)").returncode == 4


def test_imports_are_not_searched_for_garbage_and_what_follows_is() -> None:
    done = run(f"""
atexit.register(lambda: print(gc.get_freeze_count()))
with process.imports():
    print(gc.isenabled())
    {CYCLE}
print(gc.isenabled(), any(each is lasting for each in gc.get_objects()))
{CYCLE}
print(any(each is lasting for each in gc.get_objects()))
""")
    assert done.stdout.split() == ["False", "True", "False", "True", "0"], done.stderr


def test_a_program_whose_imports_are_at_the_top_is_the_same() -> None:
    done = run(f"""
process.begin()
print(gc.isenabled())
{CYCLE}
def program():
    print(gc.isenabled(), any(each is lasting for each in gc.get_objects()))
    return 5
process.run_to_the_end(program)
""")
    assert (done.returncode, done.stdout.split()) == (5, ["False", "True", "False"]), done.stderr
