"""Runs Python programs of the tests without starting Python: forks of one process that has imported the libraries.

A session has one server (see resident.py) and ends it. A program gets its own arguments, directory, environment, output
and exit status. `accelerate launch` runs as it is: the fork that becomes the launcher makes a fork for each rank first,
and hands each what it would have started.

The server has one thread and has computed nothing, so a fork of it is as good as a fresh process, but for two things:
all forks hash strings alike, and none clears its modules at its end. Tests that compare ranks of fresh processes would
find a result that depends on either.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

PRELOADED = (
    "numpy", "torch", "torch.distributed.run", "torch.utils.tensorboard", "pandas", "pyarrow.parquet", "datasets",
    "transformers.models.auto.modeling_auto", "transformers.models.qwen2.modeling_qwen2",
    "transformers.tokenization_utils_tokenizers", "accelerate.commands.launch", "peft", "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon", "deepspeed.module_inject.auto_ep_layer", "jsonargparse",
    "docstring_parser", "rich.live", "safetensors.torch",
    "grpo_dist.train", "grpo_dist.evaluate", "grpo_dist.rewards.math",
)  # fmt: skip
ROOT = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
HUB = {"HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE"}
"""Variables of the hub's library, which reads them while it is imported: forks let it read them again."""
LAUNCHER = ["-m", "accelerate.commands.launch"]
MAX_BYTES = 2**17
"""Of a request: arguments and environment."""


def main() -> None:
    """Import, serve, and in each fork become the program that was asked for."""
    serve_to_the_end(socket.socket(fileno=int(sys.argv[1])), import_all())


def import_all() -> dict[str, str]:
    """Import the libraries; returns the variables that this has set."""
    given = set(os.environ)
    os.environ["DS_ACCELERATOR"] = "cpu"  # as grpo_dist has it set when it imports DeepSpeed
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # pyarrow's allocator would start one
    sys.path.insert(0, ROOT)  # as a run from the checkout has it, whichever checkout is installed
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):  # another version has it elsewhere: runs import it themselves
            importlib.import_module(name)
    sys.path.remove(ROOT)
    fill_caches()
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"importing has started {len(threads) - 1} thread(s): forks would lack them")
    gc.collect()
    gc.freeze()  # a collection in a fork then leaves the shared pages alone
    return {name: value for name, value in os.environ.items() if name not in given}


def serve_to_the_end(requests: socket.socket, of_imports: Mapping[str, str]) -> NoReturn:
    """Be the server until the session ends, and in each fork the program that was asked for."""
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    library_path = [path for path in sys.path[1:] if path not in inherited]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for pytest, which then closes the socket
    job = serve(requests)
    os.chdir(job["directory"])
    run_to_its_end(lambda: become(job["words"], {**of_imports, **job["environment"]}, library_path))


def fill_caches() -> None:
    """Compute what every run needs and libraries compute once a process."""
    importlib.import_module("grpo_dist.config.parser").make_parser()
    with contextlib.suppress(ModuleNotFoundError):  # older releases have none
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("qwen2")


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork for each request, one at a time, and report its process id and exit status; returns in the forks alone."""
    while True:
        message, files, _, _ = socket.recv_fds(requests, MAX_BYTES, 2)
        if not message:  # the session has ended; Triton would report what is frozen as leaks
            gc.unfreeze()
            sys.exit()
        pid = os.fork()
        if pid == 0:
            requests.close()
            for number, file in enumerate(files, 1):
                os.dup2(file, number)
                os.close(file)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return json.loads(message)
        for file in files:
            os.close(file)
        requests.sendall(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):  # the session has ended without waiting
            requests.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def run_to_its_end(program: Callable[[], None]) -> NoReturn:
    """Run a program and end the process as Python does, but for clearing all modules, which takes half a second."""
    status, interrupted = 0, False
    try:
        program()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def become(words: Sequence[str], environment: Mapping[str, str], library_path: list[str]) -> None:
    """Do what `python WORDS` does with this environment."""
    if list(words[:2]) == LAUNCHER:
        number = int(words[words.index("--num_processes") + 1])
        rank = fork_ranks(number)
        if rank is not None:
            return become(rank["words"], rank["environment"], library_path)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["numpy"].random.seed()  # all forks have the server's generators; Python sees to its own
    sys.modules["torch"].seed()
    if not HUB.isdisjoint(environment):
        constants = importlib.reload(sys.modules["huggingface_hub.constants"])
        importlib.import_module("huggingface_hub.hf_api").api.endpoint = constants.ENDPOINT
    if words[0] == "-u":
        words = words[1:]
        for name, number in (("stdout", 1), ("stderr", 2)):
            plain = io.FileIO(number, "w", closefd=False)
            old = getattr(sys, name)
            setattr(sys, name, io.TextIOWrapper(plain, old.encoding, old.errors, write_through=True))  # type: ignore[arg-type]
    script_path = os.getcwd() if words[0] == "-m" else os.path.dirname(os.path.realpath(words[0]))
    added = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [script_path, *map(os.path.abspath, added), *library_path]
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")
    return None


_waiting: list[tuple[int, int]] = []
"""Forks that have not become a rank yet: process id, and the pipe that says which."""


class ForkedRank:
    """What torch's launcher uses of `subprocess.Popen`, for a fork that waits to become a rank."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str]) -> None:
        self.pid, pipe = _waiting.pop(0)
        self.returncode: int | None = None
        with open(pipe, "w") as file:
            json.dump({"words": args[1:], "environment": dict(env)}, file)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit status; raises TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode


def fork_ranks(number: int) -> dict[str, Any] | None:
    """Fork the ranks before the launcher starts threads; returns None in the launcher, in a rank what it is to be."""
    for _ in range(number):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for pipe in (write, *(pipe for _, pipe in _waiting)):
                os.close(pipe)
            with open(read) as file:
                message = file.read()
            if not message:  # the launcher ended without starting it
                sys.exit()
            return json.loads(message)
        os.close(read)
        _waiting.append((pid, write))
    handler = importlib.import_module("torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler")
    handler.SubprocessHandler._popen = lambda _, args, env: ForkedRank(args, env)
    return None


if __name__ == "__main__":
    main()
