"""One scoring worker, as its parent uses it: started, called with a time limit, killed with all its children."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...config.schema import RewardConfig
from ...config.values import SECRET
from ..placement import Placement
from ..registry import Parameters, RewardFunction
from .channel import Channel, encoded
from .worker import MARKER, answer, resolve_for

START_SECONDS = 300.0  # the import of a user's module may load a model; one that hangs must still end
_STDERR = 2
# Variables by which launchers describe a job. With these in its environment, a reward that imports torch.distributed,
# DeepSpeed or an MPI would start as a rank and wait for the others.
_DISTRIBUTED = re.compile(
    r"(LOCAL_|NODE_|GROUP_|ROLE_|CROSS_)?(RANK|WORLD_SIZE)|ROLE_NAME|(MASTER|TORCHELASTIC|ACCELERATE|PMI|OMPI)_.*"
)
# The worker gets the parent's sys.path, with the current directory, and never sees the parent's __main__.
_BOOTSTRAP = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main(int(sys.argv[3]), int(sys.argv[4]))"
)


def start_worker(
    module: str, allowed: Sequence[str], key: str, gpu: bool = False
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a process that runs `main(descriptor, parent)` of a module, and return it with our end of its socket.

    `allowed` are the environment variables it gets although they look like secrets, and `key` is the option that names
    them. Raises ValueError where one is not set, on Windows, and where the system allows no further process.
    """
    if sys.platform == "win32":
        raise ValueError("rewards and environments run in processes that need Linux or macOS; on Windows, use WSL 2")
    environment = worker_environment(os.environ, allowed, gpu=gpu, key=key) | {MARKER: uuid.uuid4().hex}
    with _within_limits(), contextlib.ExitStack() as on_failure:
        ours, theirs = socket.socketpair()
        on_failure.callback(ours.close)
        with theirs:
            arguments = [json.dumps(sys.path), module, str(theirs.fileno()), str(os.getpid())]
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,  # users see what their code prints, and it is never read as a result
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C goes to the parent alone, and a kill reaches all children
            )
        on_failure.pop_all()
    return process, ours


@contextlib.contextmanager
def _within_limits() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
            raise
        raise no_further_worker(error) from error


def no_further_worker(error: Exception) -> ValueError:
    """The error where the system allows no further process, thread or file."""
    return ValueError(f"a worker process cannot be started ({error}): raise the limit of processes and threads "
                      "(ulimit -u, pids.max of a container) or of open files (ulimit -n), or lower scoring.num_workers "
                      "and environment.workers")  # fmt: skip


def signal_kill(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a process of `start_worker` and its children; safe from any thread, and after their end."""
    # Until `wait`, its number cannot belong to another process.
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)


class WorkerProcess:
    """A running worker; its caller waits."""

    def __init__(
        self,
        rewards: Sequence[RewardConfig],
        placement: Placement,
        allowed: Sequence[str],
        memory_limit_bytes: int | None,
    ) -> None:
        """Start the process and wait until it has resolved the rewards with this placement.

        `allowed` are environment variables that it gets although their names look like secrets. Raises ValueError
        where a reward cannot be resolved, and where the process ends or hangs before that.
        """
        self._process, connection = start_worker(
            "grpo_dist.rewards.pool.worker", allowed, "rewards.environment", gpu=placement == "gpu"
        )
        self._channel = Channel(connection)
        try:
            self._channel.send(pickle.dumps((list(rewards), placement, memory_limit_bytes)), START_SECONDS)
            answer = json.loads(self._channel.receive(START_SECONDS))
        except (OSError, EOFError) as error:
            code = self.kill()
            late = isinstance(error, TimeoutError)
            reason = f"took more than {START_SECONDS:g} s" if late else f"exited with code {code}"
            raise ValueError(
                f"rewards: a scoring worker {reason} while it imported the rewards "
                f"{[reward.name for reward in rewards]}; its output is above"
            ) from error
        if "error" in answer:
            self.kill()
            raise ValueError(answer["error"])
        self.placements: list[Placement] = [reward["placement"] for reward in answer["rewards"]]
        """Where each reward declares to run."""
        self.parameters = [
            _read_parameters(reward) if reward["placement"] == placement else None for reward in answer["rewards"]
        ]
        """The keywords that each reward takes; None where it has another placement."""

    def call(self, request: bytes, timeout_seconds: float) -> dict[str, Any]:
        """Make one call and return the worker's answer (see `worker.answer` for both).

        Raises TimeoutError after `timeout_seconds`; OSError, EOFError or ValueError where the worker has ended or
        its answer is no message. After any of them the worker has to be killed.
        """
        self._channel.send(request, timeout_seconds)
        return json.loads(self._channel.receive(timeout_seconds))

    def signal_kill(self) -> None:
        """Send SIGKILL to the worker and its children; safe from any thread, and after their end."""
        signal_kill(self._process)

    def kill(self) -> int:
        """Kill the worker and its children; returns its own exit code where it had ended, else -9."""
        self.signal_kill()
        self._channel.close()
        return self._process.wait()


class ThisProcess:
    """The training process itself, in the form of a worker that cannot be killed."""

    def __init__(self, rewards: Sequence[RewardConfig]) -> None:
        """Resolve the rewards; raises ValueError where one cannot be resolved."""
        self._rewards = [resolve_for(config, "main") for config in rewards]
        self.placements: list[Placement] = ["main"] * len(rewards)
        self.parameters: list[Parameters | None] = [
            reward.parameters if isinstance(reward, RewardFunction) else None for reward in self._rewards
        ]

    def call(self, request: bytes, timeout_seconds: float) -> dict[str, Any]:
        """Make one call in the calling thread, without a time limit."""
        value: dict[str, Any] = json.loads(encoded(answer(self._rewards, request)))  # as another process gives it
        return value

    def signal_kill(self) -> None:
        """Do nothing: the training continues."""

    def kill(self) -> int:
        """Do nothing: the training continues."""
        return 0


def worker_environment(
    environment: Mapping[str, str], allowed: Sequence[str] = (), gpu: bool = False, key: str = "rewards.environment"
) -> dict[str, str]:
    """Return the environment of a worker: the given one without launcher variables and without secrets that are not
    allowed.

    A worker has no GPU and one thread; with `gpu` it has the rank's GPU and the rank's threads. Raises ValueError where
    an allowed variable is not set.
    """
    absent = [name for name in allowed if name not in environment]
    if absent:
        raise ValueError(
            f"{key} names {', '.join(absent)}, which this process does not have: export it before the "
            "launch, or take it out"
        )
    kept = {
        name: value
        for name, value in environment.items()
        if name in allowed or not (SECRET.search(name) or _DISTRIBUTED.fullmatch(name))
    }
    # Unbuffered output: otherwise the output of a reward that is killed would be lost.
    kept |= {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": _own_gpu(environment) if gpu else ""}
    # A set of texts has the same order in every process, and after a restart.
    kept.setdefault("PYTHONHASHSEED", "0")
    return kept if gpu else kept | {"OMP_NUM_THREADS": "1"}


def _own_gpu(environment: Mapping[str, str]) -> str:
    """Return the name of this rank's GPU, among those that the environment lets it see."""
    rank, visible = environment.get("LOCAL_RANK", "0"), environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return rank
    names = visible.split(",")
    return names[int(rank)] if int(rank) < len(names) else names[0]  # some launchers let each rank see its own GPU only


def _read_parameters(description: dict[str, Any]) -> Parameters:
    accepted = description["accepted"]
    return Parameters(
        accepted=None if accepted is None else frozenset(accepted),
        required=frozenset(description["required"]),
        bound=frozenset(description["bound"]),
        most_items=description["most_items"],
    )
