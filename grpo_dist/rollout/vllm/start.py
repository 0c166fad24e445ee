"""From a config to the engine that samples on vLLM servers."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from pathlib import Path

from ...config.schema import Config
from ...config.vllm import SHARED
from ...distributed.ranks import Ranks
from ...distributed.watch import Interrupted
from ...model.config_files import load_model_config
from ..choose import UnfitEngine
from .base import provide_base, served_model
from .client import Servers, key
from .engine import VllmEngine
from .policy import ServedPolicy, ServedRun
from .server import OwnServer, StartError, command_line


def make_vllm_engine(run: ServedRun, step: int = 0) -> VllmEngine:
    """The engine, after its servers have answered; a collective.

    `step` is that of the next update. Raises UnfitEngine where there is no server, or none that serves the run.
    """
    config, ranks, with_routes = run.config, run.ranks, run.routers is not None
    options = config.rollout.vllm
    assert options is not None, "check_vllm sees to it"
    try:
        key()
    except ValueError as error:  # on all ranks: a launch gives all the same environment
        raise UnfitEngine(f"rollout.vllm: {error}") from error
    model_config = load_model_config(config.model)
    model = served_model(config, model_config)
    with run.weights.open() if run.policy is None else nullcontext(run.policy.causal_lm) as trained:
        problem = provide_base(config, model_config, trained, ranks)
    if problem is not None:
        raise UnfitEngine(problem)
    own = None
    if options.urls is None and ranks.is_main:
        try:
            own = _start(config, model, ranks, with_routes)
        except (StartError, OSError) as error:
            problem = str(error)
    ranks.wait_at("started the vLLM server")  # which loads a model
    urls, problem = ranks.gather_objects((options.urls if own is None else [own.url], problem))[0]
    if problem is not None:
        raise UnfitEngine(problem)
    assert urls is not None, "without urls the main rank has started a server"
    servers = Servers(urls, options.timeout_seconds, options.retries, ranks.rank,
                      own.obituary if own else lambda: None)  # fmt: skip
    served = ServedPolicy(run, servers, step, command_line(config, model, with_routes))

    def share_memory(what: str) -> None:
        path = {"sleep": "/sleep?level=1", "wake_up": "/wake_up"}[what]
        served.on_main(lambda: servers.run(servers.insist(servers.servers[0], "POST", path)))

    engine = VllmEngine(served, own, share_memory if options.devices == SHARED else None)
    try:
        served.start()
    except Interrupted as error:
        engine.close()
        raise UnfitEngine(str(error)) from error
    return engine


def _start(config: Config, model: str, ranks: Ranks, with_routes: bool) -> OwnServer:
    """A server that answers."""
    is_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == ranks.num_ranks
    server = OwnServer(config, model, Path(config.train.output_dir),
                       "127.0.0.1" if is_one_machine else socket.gethostname(), with_routes)  # fmt: skip
    server.wait_until_ready()
    return server
