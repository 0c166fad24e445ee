"""Episodes whose turns a server with vLLM's interface draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_vllm import COMPLETIONS, FakeVllm
from torch import nn

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from grpo_dist.config.vllm import VllmConfig
from grpo_dist.data.mixture import load_training
from grpo_dist.distributed.ranks import Ranks
from grpo_dist.model.attention import NAME
from grpo_dist.model.config_files import end_token_ids, load_tokenizer
from grpo_dist.model.load import load_policy, trainable
from grpo_dist.model.rollout_weights import RolloutModel
from grpo_dist.model.toy import toy_path
from grpo_dist.rollout import Request, RowDecoder, Sampling, awake, decode_all
from grpo_dist.rollout.playing import episodes_of, open_host, prompt_reader
from grpo_dist.rollout.vllm.messages import seed_of
from grpo_dist.rollout.vllm.policy import ServedRun
from grpo_dist.rollout.vllm.start import make_vllm_engine
from grpo_dist.trainer.scoring import requests_of
from grpo_dist.types import Trajectory

SIZE, LONGEST = 3, 64
MODEL = ModelConfig(str(toy_path("toy-tools")), dtype="float32")
ENDS = end_token_ids(MODEL, load_tokenizer(MODEL))


def make_config(directory: Path, server: FakeVllm) -> Config:
    """The shipped game on a server."""
    return Config(
        model=MODEL, lora=LoraConfig(r=4),
        data=DataConfig("configs/data/guess_train.jsonl", None, answer_column=None, chat_template="always",
                        max_prompt_length=40),
        rollout=RolloutConfig(group_size=SIZE, max_completion_length=LONGEST, engine="vllm",
                              vllm=VllmConfig(urls=[server.url], retries=2)),
        environment=EnvironmentConfig(factory="configs.environments.guess_number:GuessNumber", max_turns=3, workers=1),
        rewards=[RewardConfig("environment")], train=TrainConfig(output_dir=str(directory)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[FakeVllm]:
    with FakeVllm(MODEL.name) as running:
        yield running


def played(server: FakeVllm, directory: Path) -> tuple[list[Request], list[Trajectory], nn.Module]:
    """The requests of the first turns, the episodes, and the model that the server has drawn them from."""
    config = make_config(directory, server)
    policy = load_policy(MODEL, config.lora, torch.float32, NAME)
    torch.manual_seed(1)
    with torch.no_grad():  # away from its base, but not so far that it forgets the game
        for parameter in trainable(policy).values():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
    weights = RolloutModel(policy, torch.float32, NAME)
    engine = make_vllm_engine(ServedRun(config, Ranks(torch.float32, OptimConfig()), weights, policy, ENDS))
    host = open_host(config)
    assert host is not None
    tokenizer = load_tokenizer(MODEL)
    with host:
        prompts = load_training(prompt_reader(config, tokenizer, host), config.train)[0][:3]
        episodes = episodes_of(config, host, tokenizer, ENDS)
        assert episodes is not None
        requests = requests_of(list(prompts), SIZE, slice(0, SIZE * len(prompts)), 0, "train/0")
        engine.update_weights()
        *_, (model, _) = server.adapters.values()
        with awake(engine):
            trajectories = episodes.play(engine, requests, prompts, Sampling())
    engine.close()
    return requests, trajectories, model


@pytest.fixture(scope="module")
def first(
    server: FakeVllm, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Request], list[Trajectory], nn.Module]:
    return played(server, tmp_path_factory.mktemp("first"))


def test_a_server_draws_each_turn_from_the_row_before_it(
    server: FakeVllm, first: tuple[list[Request], list[Trajectory], nn.Module]
) -> None:
    requests, trajectories, model = first
    assert {t.episode.reward for t in trajectories if t.episode} == {0.0, 1.0}
    turns = 0
    for request, each in zip(requests, trajectories, strict=True):
        at, logprobs = 0, list(each.logprobs)
        while at < len(each.ids):
            assert each.sampled[at], "a turn follows the answers of the one before"
            asked = replace(request, prompt=[*request.prompt, *each.ids[:at]], offset=at)
            (turn,) = decode_all(
                RowDecoder(ENDS, LONGEST - at), model, [Request(0, 0, asked.prompt, seed_of(asked))], Sampling()
            )
            end = at + len(turn.ids)
            assert each.ids[at:end] == turn.ids and all(each.sampled[at:end])
            assert logprobs[: len(turn.ids)] == pytest.approx(turn.logprobs, abs=1e-4)
            del logprobs[: len(turn.ids)]
            at = end
            while at < len(each.ids) and not each.sampled[at]:
                at += 1
            turns += 1
        assert not logprobs
    assert turns > len(trajectories), "some episodes have several turns"
    asked_for = [given["prompt"] for given in server.requests if given and given.get("seed") is not None]
    assert len(asked_for) >= turns and server.calls.count(COMPLETIONS) >= turns


def test_the_same_episodes_in_any_order(
    server: FakeVllm, first: tuple[list[Request], list[Trajectory], nn.Module], tmp_path: Path
) -> None:
    one, again = first[1], played(server, tmp_path)[1]
    assert [(t.ids, t.sampled, t.logprobs) for t in one] == [(t.ids, t.sampled, t.logprobs) for t in again]
