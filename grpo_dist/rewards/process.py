"""One scoring worker as its parent sees it: started fresh, called with a time limit, killed with all its children."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_dist.config import RewardConfig
from grpo_dist.rewards.channel import Channel
from grpo_dist.rewards.registry import Parameters

_START_SECONDS = 300.0  # importing a user's module may load a model; hanging in it for ever must still be found out
_STDERR = 2
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# What launchers tell a rank about its job. A reward that imports torch.distributed, DeepSpeed or an MPI with these in
# its environment would take itself for a rank and wait for the others.
_DISTRIBUTED = re.compile(
    r"(LOCAL_|NODE_|GROUP_|ROLE_|CROSS_)?(RANK|WORLD_SIZE)|ROLE_NAME|(MASTER|TORCHELASTIC|ACCELERATE|PMI|OMPI)_.*"
)
# The worker gets the parent's sys.path, current directory included, and never sees the parent's __main__.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from grpo_dist.rewards.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


class WorkerProcess:
    """A running worker; whoever calls it waits."""

    def __init__(self, rewards: Sequence[RewardConfig]) -> None:
        """Start the process and wait until it has resolved the rewards.

        Raises ValueError with the user's mistake where a reward cannot be resolved, RuntimeError where the process ends
        or hangs before that.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,  # what a reward prints is seen, and is never taken for a result
                env=worker_environment(os.environ),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C is for the parent, and a kill reaches all its children
            )
        self._channel = Channel(ours)
        try:
            self._channel.send(pickle.dumps(list(rewards)), _START_SECONDS)
            answer = json.loads(self._channel.receive(_START_SECONDS))
        except (OSError, EOFError) as error:
            code = self.kill()
            late = isinstance(error, TimeoutError)
            reason = f"took more than {_START_SECONDS:g} s" if late else f"exited with code {code}"
            raise RuntimeError(
                f"a scoring worker {reason} while it imported the rewards {[reward.name for reward in rewards]}; "
                "what it printed is above"
            ) from error
        if "error" in answer:
            self.kill()
            raise ValueError(answer["error"])
        self.parameters = [
            Parameters(
                accepted=None if reward["accepted"] is None else frozenset(reward["accepted"]),
                required=frozenset(reward["required"]),
                bound=frozenset(reward["bound"]),
            )
            for reward in answer["parameters"]
        ]

    def call(self, reward: int, count: int, keywords: dict[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """Call a reward by its place with `count` completions and return the worker's answer (see `worker.answer`).

        Raises TimeoutError after `timeout_seconds`; OSError, EOFError or ValueError where the worker is dead or has
        lost its senses. After any of them the worker has to be killed.
        """
        self._channel.send(pickle.dumps((reward, count, keywords)), timeout_seconds)
        return json.loads(self._channel.receive(timeout_seconds))

    def signal_kill(self) -> None:
        """Send SIGKILL to the worker and its children; safe from any thread, and after the end."""
        # Until it has been waited for, its number cannot belong to another process.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> int:
        """Kill the worker and its children, and return the exit code it had come to by itself, or -9."""
        self.signal_kill()
        self._channel.close()
        return self._process.wait()


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker: the given one without secrets and launcher variables, no GPU, one thread."""
    kept = {
        name: value
        for name, value in environment.items()
        if not _SECRET.search(name) and not _DISTRIBUTED.fullmatch(name)
    }
    # Unbuffered: what a reward has printed before it is killed would be lost.
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
