"""Check the vLLM servers of a config, or what would start one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from ..config.schema import Config
from ..model.files import model_path
from ..rollout.replay import needs_routes
from ..rollout.vllm.base import is_dequantized, served_model
from ..rollout.vllm.client import UNREADABLE, ask
from ..rollout.vllm.messages import COMPLETIONS, one_token, read_models, reports_routes, without_routes
from ..rollout.vllm.server import command_line
from .findings import Findings

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

_ANSWER_SECONDS = 5.0
_IMPORT_SECONDS = 300.0


def check_servers(config: Config, model_config: PreTrainedConfig | None, findings: Findings) -> None:
    """Note what draws the completions, and whether it is there; nothing where the run's own processes draw.
    `model_config` is None where the model cannot be read."""
    options = config.rollout.vllm
    if options is None:
        return
    with_routes = model_config is not None and needs_routes(config.rollout, model_config)
    model = model_path(config.model) if model_config is None else served_model(config, model_config)
    lines = [f"a server is started with: {command_line(config, model, with_routes)}"]
    if model_config is not None and is_dequantized(config, model_config):
        lines.append(f"the run writes its dequantised base to {model}, for servers; so does, before the run, "
                     "`python -m grpo_dist.rollout.vllm.serve`, which starts one")  # fmt: skip
    if options.python is not None and shutil.which(python := os.path.expanduser(options.python)):  # else refused early
        lines += _version(python, findings)
    for url in options.urls or ():
        lines += _answer(url, config, with_routes, findings)
    findings.results["servers"] = lines


def _version(python: str, findings: Findings) -> list[str]:
    try:
        done = subprocess.run([python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True,
                              timeout=_IMPORT_SECONDS, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        findings.problems.append(f"rollout.vllm.python: {python!r} given, which does not start ({error}): "
                                 "launch/setup_vllm.sh makes an environment")  # fmt: skip
        return []
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        findings.problems.append(f"rollout.vllm.python: {python!r} given, which cannot import vllm ({last[0]}): "
                                 "launch/setup_vllm.sh makes an environment")  # fmt: skip
        return []
    return [f"vLLM {done.stdout.split()[-1]} in {python}"]


def _answer(url: str, config: Config, with_routes: bool, findings: Findings) -> list[str]:
    try:
        base, _ = read_models(json.loads(ask(url, "/v1/models", timeout_seconds=_ANSWER_SECONDS)))
        if with_routes or config.rollout.stop:
            message = one_token(base["id"], config.rollout.stop)
            answer = json.loads(ask(url, COMPLETIONS, message, timeout_seconds=_ANSWER_SECONDS))
            if with_routes and not reports_routes(answer):
                findings.problems.append(without_routes(url))
    except (OSError, *UNREADABLE) as error:
        findings.problems.append(f"rollout.vllm.urls: {url} does not answer ({error}): start it first")
        return []
    longest = base.get("max_model_len")
    if longest is not None and longest < config.max_sequence_length:
        findings.problems.append(f"rollout.vllm.urls: {url} serves sequences of {longest} tokens, expected "
                                 f"{config.max_sequence_length} (--max-model-len)")  # fmt: skip
    return [f"{url} serves {base['id']}, up to {longest} tokens"]
