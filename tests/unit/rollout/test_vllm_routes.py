"""The experts that tokens took on servers with vLLM's interface are those that reference and update compute with."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import FakeVllm
from served import LORA, REQUESTS, Training
from small_experts import make_experts
from transformers import AutoModelForCausalLM
from vllm_on_cpu import python_that_reports_routes

from grpo_dist.config.rollout import RolloutConfig
from grpo_dist.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from grpo_dist.config.vllm import VllmConfig
from grpo_dist.distributed.ranks import Ranks
from grpo_dist.model import attention
from grpo_dist.model.config_files import load_model_config
from grpo_dist.model.routing import Routers
from grpo_dist.preflight.findings import Findings
from grpo_dist.preflight.servers import check_servers
from grpo_dist.rollout import Sampling, sample
from grpo_dist.rollout.choose import UnfitEngine
from grpo_dist.rollout.local import LoadedModel
from grpo_dist.rollout.replay import needs_routes, settle_replay
from grpo_dist.rollout.vllm.messages import Answer, completion_message, read_answer
from grpo_dist.rollout.vllm.policy import ServedRun
from grpo_dist.rollout.vllm.serve import command_of
from grpo_dist.rollout.vllm.server import ROUTES
from grpo_dist.rollout.vllm.start import make_vllm_engine

DENSE_FIRST = {"mlp_only_layers": [0], "num_hidden_layers": 3}
"""The first of three layers has no experts."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = make_experts(tmp_path_factory.mktemp("model"), "qwen3_moe", **DENSE_FIRST)
    return ModelConfig(name=path, dtype="float32")


@pytest.fixture
def server(base: ModelConfig) -> Iterator[FakeVllm]:
    with FakeVllm(base.name, reports_routes=True) as running:
        yield running


def start(base: ModelConfig, directory: Path, server: FakeVllm) -> Training:
    return Training(base, directory, server, lora=LORA, replays=True, routing_replay=True)


def test_routes_are_those_of_the_policy(base: ModelConfig, server: FakeVllm, tmp_path: Path) -> None:
    """By a plain forward pass over prompt and completion; the last token has none."""
    training = start(base, tmp_path / "run", server)
    for _ in range(2):
        training.learn(0.3)
        training.engine.update_weights()
        for request, each in zip(REQUESTS, sample(training.engine, REQUESTS, Sampling()), strict=True):
            row = torch.tensor([*request.prompt, *each.ids])
            layout = attention.RowLayout([(len(row), [])])
            with torch.no_grad():
                training.policy.causal_lm(input_ids=row[None], position_ids=torch.arange(len(row))[None], layout=layout)
            assert training.routers is not None and each.routes is not None
            assert each.routes.shape == (len(row), 2, 2) and each.routes.dtype == torch.uint8
            assert torch.equal(each.routes[:-1].sort(-1).values, training.routers.recorded()[:-1].sort(-1).values)
            assert (each.routes[-1] == 255).all()
    training.engine.close()


def test_a_server_that_does_not_report_is_refused(base: ModelConfig, server: FakeVllm, tmp_path: Path) -> None:
    server.reports_routes = False
    with pytest.raises(UnfitEngine, match=r"rollout\.routing_replay: http.*does not report") as caught:
        start(base, tmp_path / "run", server)
    assert ROUTES in str(caught.value) and "rollout.routing_replay: false" in str(caught.value)


def answer(table: np.ndarray, model: Any) -> Answer:
    """What is read from an answer with 3 tokens for a prompt of 3."""
    with io.BytesIO() as file:
        np.save(file, table)
        routed = base64.b64encode(file.getvalue()).decode()
    asked = completion_message("m", REQUESTS[0], Sampling(), [7], 3)
    choice = {"prompt_token_ids": REQUESTS[0].prompt, "finish_reason": "length", "token_ids": [1, 2, 3],
              "logprobs": {"token_logprobs": [-1.0] * 3}, "routed_experts": routed}  # fmt: skip
    return read_answer({"model": "m", "choices": [choice]}, asked, routers=Routers(model))


def test_only_right_routes_are_taken(base: ModelConfig) -> None:
    def blank() -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(load_model_config(base))

    table = np.arange(5 * 3 * 2).reshape(5, 3, 2) % 6
    read = answer(table.astype(np.uint16), blank())
    assert read.routes is not None and read.routes.dtype == torch.uint8
    assert read.routes[:-1].tolist() == table[:, 1:].tolist(), "of the layers that have experts"
    for wrong in (table[1:], table[:, :2], table[..., :1], table + 1):
        with pytest.raises(ValueError, match="expert"):
            answer(wrong, blank())


def test_the_argument_of_a_server(base: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    """It is given where replay is asked for; `auto` does not ask for it on a CPU, where vLLM cannot."""
    words = [
        "python",
        "8000",
        "--model.name",
        base.name,
        "--rollout.engine",
        "vllm",
        "--rollout.vllm.urls",
        "[http://a]",
    ]
    model_config = load_model_config(base)
    for replay, expected in ((True, True), ("auto", False), (False, False)):
        command, _ = command_of([*words, "--rollout.routing_replay", str(replay).lower()])
        assert (ROUTES in command) == expected
        rollout = RolloutConfig(engine="vllm", vllm=VllmConfig(urls=["http://a"]), routing_replay=replay)
        assert needs_routes(rollout, model_config) == expected
        assert not needs_routes(rollout, load_model_config(ModelConfig("toy")))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    rollout = RolloutConfig(engine="vllm", vllm=VllmConfig(urls=["http://a"]))
    assert settle_replay([model], rollout, True, lambda thing: [thing]) is None
    assert "vLLM does not report the experts of a token on a CPU" in caplog.text


def test_check_asks_servers_for_routes(base: ModelConfig, server: FakeVllm) -> None:
    rollout = RolloutConfig(engine="vllm", vllm=VllmConfig(urls=[server.url]), routing_replay=True)
    for reports in (True, False):
        server.reports_routes, findings = reports, Findings()
        check_servers(Config(model=base, rollout=rollout), load_model_config(base), findings)
        assert ROUTES in findings.results["servers"][0], "how to start one"
        assert [each for each in findings.problems if "does not report" in each] == findings.problems
        assert len(findings.problems) == (0 if reports else 1)


@pytest.mark.slow
@pytest.mark.skipif("GRPO_DIST_VLLM" not in os.environ, reason="GRPO_DIST_VLLM does not name the Python of vLLM")
def test_vllm_itself_reports_the_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed model: on a CPU, vLLM takes no adapters of a mixture of experts, and its new weights are wrong."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    path = make_experts(tmp_path / "model", "qwen3_moe", head_dim=32, **DENSE_FIRST)
    python = python_that_reports_routes(tmp_path / "vllm", os.environ["GRPO_DIST_VLLM"])
    vllm = VllmConfig(python=python, args=["--enforce-eager"])
    rollout = RolloutConfig(max_completion_length=6, engine="vllm", vllm=vllm, routing_replay=True)
    config = Config(model=ModelConfig(name=path, dtype="float32"), lora=None, data=DataConfig(max_prompt_length=64),
                    train=TrainConfig(output_dir=str(tmp_path)), rollout=rollout)  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    routers = Routers(model)
    ranks = Ranks(torch.float32, OptimConfig())
    engine = make_vllm_engine(ServedRun(config, ranks, LoadedModel(model), None, [256], routers))
    try:
        engine.update_weights()
        assert engine.metrics()["rollout/probe_gap"] <= 1e-4
        for request, each in zip(REQUESTS, sample(engine, REQUESTS, Sampling()), strict=True):
            with torch.no_grad():
                model(input_ids=torch.tensor([[*request.prompt, *each.ids]]))
            assert each.routes is not None
            assert torch.equal(each.routes[:-1].sort(-1).values, routers.recorded()[:-1].sort(-1).values)
    finally:
        engine.close()
