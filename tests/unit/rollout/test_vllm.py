"""Servers with vLLM's interface that fail, and servers that sample from another policy than the trainer's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm
from small_models import make_policy, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from grpo_dist.config.schema import Config, DataConfig, LoraConfig, ModelConfig, OptimConfig, RolloutConfig, TrainConfig
from grpo_dist.config.vllm import VllmConfig, logprobs_mode
from grpo_dist.distributed.ranks import Ranks
from grpo_dist.distributed.watch import Interrupted
from grpo_dist.model.attention import NAME, RowLayout
from grpo_dist.model.load import trainable
from grpo_dist.model.policy import Policy
from grpo_dist.model.rollout_weights import RolloutModel
from grpo_dist.rollout import Request, RowDecoder, Sampling, decode_all, sample
from grpo_dist.rollout.choose import UnfitEngine
from grpo_dist.rollout.sampling import sampling_with
from grpo_dist.rollout.stop import stop_strings
from grpo_dist.rollout.vllm import client
from grpo_dist.rollout.vllm.messages import completion_message, read_answer, seed_of
from grpo_dist.rollout.vllm.start import make_vllm_engine

ENDS = [256, 7, 9]
LORA = LoraConfig(r=3, alpha=6.0)
PROMPTS = [[5, 9, 33], [60, 7, 12, 80], [41, 41]]
REQUESTS = [Request(slot, number, PROMPTS[slot], key=100 * slot + number) for slot in range(3) for number in range(2)]


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_WAIT_SECONDS", 0.05)


@pytest.fixture
def base(tmp_path: Path) -> ModelConfig:
    return small_model(tmp_path / "base", seed=0)


def small_model(path: Path, seed: int) -> ModelConfig:
    torch.manual_seed(seed)
    config = Qwen2Config(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=256,
                         bos_token_id=None, initializer_range=0.2)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return ModelConfig(name=str(path), dtype="float32")


class Training:
    """A policy, and the engine that asks some servers for what it would draw."""

    def __init__(self, base: ModelConfig, directory: Path, *servers: FakeVllm, lora: LoraConfig | None = LORA,
                 timeout_seconds: float = 60.0, **rollout: Any) -> None:  # fmt: skip
        self.config = Config(
            model=base, lora=lora, data=DataConfig(max_prompt_length=64), train=TrainConfig(output_dir=str(directory)),
            rollout=RolloutConfig(
                max_completion_length=6, engine="vllm",
                vllm=VllmConfig(urls=[server.url for server in servers], retries=2,
                                timeout_seconds=timeout_seconds), **rollout,
            ),
        )  # fmt: skip
        self.policy = make_policy(base, lora)
        weights = RolloutModel(self.policy, torch.float32, NAME)
        self.engine = make_vllm_engine(self.config, Ranks(torch.float32, OptimConfig()), weights, self.policy, ENDS, 0)

    def learn(self, scale: float = 0.05) -> None:
        """An update of the policy."""
        with torch.no_grad():
            for parameter in trainable(self.policy).values():
                parameter.add_(torch.randn(parameter.shape) * scale)

    def draw(self, requests: list[Request] = REQUESTS) -> list[list[int]]:
        sampling = Sampling(self.config.rollout.temperature)
        return [each.ids for each in sample(self.engine, requests, sampling)]


@pytest.fixture
def start(base: ModelConfig, tmp_path: Path) -> Iterator[Callable[..., Training]]:
    begun: list[Training] = []

    def make(*servers: FakeVllm, **options: Any) -> Training:
        begun.append(Training(base, tmp_path / f"run{len(begun)}", *servers, **options))
        return begun[-1]

    yield make
    for each in begun:
        each.engine.close()


@pytest.fixture
def server(base: ModelConfig) -> Iterator[FakeVllm]:
    with FakeVllm(base.name) as running:
        yield running


Start = Callable[..., Training]


def test_what_is_drawn_is_the_policys(start: Start, server: FakeVllm) -> None:
    training = start(server, temperature=0.7)
    training.engine.update_weights()
    drawn = sample(training.engine, REQUESTS, Sampling(0.7))
    assert [(each.slot, each.sample) for each in drawn] == [(each.slot, each.sample) for each in REQUESTS]
    for request, each in zip(REQUESTS, drawn, strict=True):
        assert each.finished == (each.ids[-1] in ENDS) and len(each.ids) <= 6
        assert each.logprobs == pytest.approx(scores(training.policy, request.prompt, each.ids, 0.7), abs=1e-4)
    assert training.engine.metrics()["rollout/probe_gap"] <= 1e-4


def test_stop_strings_and_bans_are_the_trainers(start: Start, server: FakeVllm) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.path)
    free = decode_all(RowDecoder(ENDS, 6), server.base, REQUESTS)
    rollout = {"stop": [*"acegikmoqsuwy02468"], "min_new_tokens": 2, "banned_tokens": [free[1].ids[0]]}
    training = start(server, **rollout)
    training.engine.update_weights()
    sampling = sampling_with(training.config.rollout, tokenizer, ENDS, 257)
    requests = [replace(request, offset=request.sample) for request in REQUESTS]
    drawn = sample(training.engine, requests, sampling)
    keyed = [replace(request, key=seed_of(request), offset=0) for request in requests]
    ((served, _),) = server.adapters.values()
    for each, request in zip(drawn, keyed, strict=True):
        (expected,) = decode_all(RowDecoder(ENDS, 6), served, [request],
                                 replace(sampling, min_new_tokens=2 - request.sample))  # fmt: skip
        assert (each.ids, each.finished) == (expected.ids, expected.finished)
    assert any(each.finished and each.ids[-1] not in ENDS for each in drawn)
    assert free[1].ids[0] not in {token for each in drawn for token in each.ids}


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"token_ids": [97, 5], "finish_reason": "stop"}, "a stop string"), ({"token_ids": [97, 4]}, "banned")],
)
def test_an_answer_that_breaks_the_rules_is_refused(choice: dict[str, Any], message: str) -> None:
    sampling = Sampling(banned=(4,), stop=stop_strings(["b"], [bytes([n]) for n in range(256)]))
    asked = completion_message("m", REQUESTS[0], sampling, [7], 2)
    content = {"model": "m", "choices": [{"prompt_token_ids": REQUESTS[0].prompt, "finish_reason": "length",
                                          "logprobs": {"token_logprobs": [-1.0, -1.0]}, **choice}]}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        read_answer(content, asked, sampling)
    content["choices"][0] |= {"token_ids": [98, 5], "finish_reason": "length"}
    assert read_answer(content, asked, sampling).ids == [98]


def scores(policy: Policy, prompt: list[int], ids: list[int], temperature: float) -> list[float]:
    row = torch.tensor([*prompt, *ids])
    layout = RowLayout([(len(row), [])])
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=row[None], position_ids=torch.arange(len(row))[None], layout=layout).logits
    rows = torch.log_softmax(logits[0, len(prompt) - 1 : -1] / temperature, -1)
    return rows.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapters", "all weights"])
def test_each_update_reaches_the_servers(start: Start, server: FakeVllm, lora: LoraConfig | None) -> None:
    training = start(server, lora=lora)
    for _ in range(4):
        training.engine.update_weights()
        assert training.engine.metrics()["rollout/probe_gap"] <= 1e-4
        drawn = sample(training.engine, REQUESTS[:1], Sampling())[0]
        assert drawn.logprobs == pytest.approx(scores(training.policy, PROMPTS[0], drawn.ids, 1.0), abs=1e-4)
        training.learn()
    assert len(server.adapters) == (0 if lora is None else 2), "the newest policy, and the one before it"
    files = list((Path(training.config.train.output_dir) / "rollout").iterdir())
    assert len(files) == len(server.adapters)
    assert lora is not None or server.calls.count("/reset_prefix_cache") == 4, "its blocks are of older weights"
    training.engine.close()
    assert not server.adapters and not list((Path(training.config.train.output_dir) / "rollout").iterdir())


def test_the_seed_alone_decides(start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    together = training.draw()
    assert [training.draw([request])[0] for request in REQUESTS] == together
    assert training.draw([replace(REQUESTS[0], key=77)])[0] != together[0]
    later = replace(REQUESTS[0], prompt=[*PROMPTS[0], *together[0][:3]], offset=3)
    assert seed_of(later) != seed_of(REQUESTS[0]), "the next turn of an episode has noise of its own"
    assert 0 <= seed_of(Request(0, 0, [1], key=-1)) < 2**63, "servers take -1 for no seed"


@pytest.mark.parametrize("plant", ["stale", "scaling", "raw", "base"])
def test_another_policy_than_the_trainers_stops_the_run(plant: str, start: Start, base: ModelConfig,
                                                       tmp_path: Path) -> None:  # fmt: skip
    wrong = small_model(tmp_path / "wrong", seed=1).name if plant == "base" else base.name
    with FakeVllm(wrong, plant=plant) as server:
        training = start(server, temperature=0.7)
        if plant == "stale":
            training.engine.update_weights()
            training.learn(1e-3)
        with pytest.raises(Interrupted, match=f"{server.url} does not sample from the policy") as caught:
            training.engine.update_weights()
        assert caught.value.failed and "--dtype float32" in str(caught.value), "it names what the run needs"
        if plant == "stale":
            assert "those of before the update" in str(caught.value)


def test_the_probe_knows_the_servers_mode(start: Start, server: FakeVllm) -> None:
    server.plant = "raw"
    training = start(server, top_p=0.9)
    training.engine.update_weights()
    assert logprobs_mode(training.config.rollout) == "raw_logprobs"
    assert training.engine.metrics()["rollout/probe_gap"] <= 1e-4


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "json", "empty", "hang"])
def test_a_failure_is_made_good(fault: str, start: Start, server: FakeVllm) -> None:
    training = start(server, timeout_seconds=2.0 if fault == "hang" else 60.0)
    training.engine.update_weights()
    expected = training.draw()
    server.faults = [fault]
    assert training.draw() == expected, "the same seeds give the same completions"
    assert training.engine.metrics()["rollout/retried"] >= 1


BENT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a fragment": lambda choice: choice.update(finish_reason="abort", token_ids=choice["token_ids"][:1]),
    "a fragment that looks finished": lambda choice: choice.update(
        finish_reason="stop", token_ids=[5], logprobs={"token_logprobs": [-1.0]}
    ),
    "another prompt": lambda choice: choice.update(prompt_token_ids=choice["prompt_token_ids"][1:]),
    "too few log-probabilities": lambda choice: choice["logprobs"].update(token_logprobs=[]),
    "no tokens": lambda choice: choice.update(token_ids=None),
}


@pytest.mark.parametrize("name", BENT)
def test_nothing_but_a_complete_answer_is_taken(name: str, start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    server.bend = BENT[name]
    with pytest.raises(Interrupted, match="an answer that is none") as caught:
        training.draw()
    assert caught.value.failed


def test_log_probabilities_that_are_not_finite_are_the_models_fault(start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    server.bend = lambda choice: choice["logprobs"].update(token_logprobs=[-9999.0] * len(choice["token_ids"]))
    with pytest.raises(FloatingPointError, match="overflowed"):
        training.draw()


def test_a_server_that_dies_is_replaced_by_another(start: Start, base: ModelConfig) -> None:
    with FakeVllm(base.name) as first, FakeVllm(base.name) as second:
        training = start(first, second)
        training.engine.update_weights()
        many = [Request(slot, number, PROMPTS[slot % 3], key=100 * slot + number)
                for slot in range(12) for number in range(2)]  # fmt: skip
        expected = training.draw(many)
        asked = [sum("seed" in (given or {}) for given in each.requests) for each in (first, second)]
        assert min(asked) > 6, "both draw"
        first.__exit__()
        assert training.draw(many) == expected
        training.learn()
        training.engine.update_weights()
        assert training.draw(many) != expected and training.engine.metrics()["rollout/probe_gap"] <= 1e-4


def test_a_group_stays_on_one_server(start: Start, base: ModelConfig) -> None:
    with FakeVllm(base.name) as first, FakeVllm(base.name) as second:
        training = start(first, second)
        training.engine.update_weights()
        for each in (first, second):
            each.requests.clear()
        training.draw([Request(slot, number, PROMPTS[slot], key=number) for slot in range(3) for number in range(4)])
        prompts = [{tuple(given["prompt"]) for given in each.requests if given} for each in (first, second)]
        assert not prompts[0] & prompts[1] and all(prompts), "its prompt is computed once"


def test_without_a_server_the_run_stops(start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    server.__exit__()
    with pytest.raises(Interrupted, match=f"{server.url}: ConnectError") as caught:
        training.draw()
    assert caught.value.failed
    with pytest.raises(Interrupted, match=f"{server.url}.*ConnectError"):
        training.engine.update_weights()


def test_a_server_that_was_started_again_gets_the_policy(start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    expected = training.draw()
    server.adapters.clear()
    assert training.draw() == expected
    assert len(server.adapters) == 1


def test_all_weights_are_not_sampled_from_a_server_that_lost_them(start: Start, server: FakeVllm) -> None:
    training = start(server, lora=None)
    training.engine.update_weights()
    server.base, server.faults = AutoModelForCausalLM.from_pretrained(server.path, dtype=torch.float32), ["cut"]
    with pytest.raises(Interrupted, match="does not sample from the policy"):
        training.draw()


def test_a_rank_that_is_too_large_is_refused_at_the_start(start: Start, base: ModelConfig) -> None:
    with FakeVllm(base.name, max_rank=2) as server:
        training = start(server)
        with pytest.raises(Interrupted, match=r"LoRA rank 3 is greater than max_lora_rank 2.*--max-lora-rank 8"):
            training.engine.update_weights()


def test_a_server_with_short_sequences_is_refused_at_the_start(start: Start, base: ModelConfig) -> None:
    with FakeVllm(base.name, longest=50) as server, pytest.raises(UnfitEngine, match="50 tokens, expected 70"):
        start(server)


def test_no_server_at_the_start(start: Start, server: FakeVllm) -> None:
    server.__exit__()
    with pytest.raises(UnfitEngine, match=f"{server.url}/v1/models.*This run needs servers"):
        start(server)


def test_a_full_disk(start: Start, server: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start(server)
    training.engine.update_weights()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo_dist.rollout.vllm.policy.write_adapter", full)
    with pytest.raises(Interrupted, match=r"cannot be written.*No space left") as caught:
        training.engine.update_weights()
    assert caught.value.failed


def test_two_runs_on_a_server(start: Start, server: FakeVllm) -> None:
    runs = [start(server), start(server)]
    runs[1].learn()
    for each in runs:
        each.engine.update_weights()
    drawn = [each.draw() for each in runs]
    assert drawn[0] != drawn[1] and [each.draw() for each in runs] == drawn
    runs[0].engine.close()
    assert runs[1].draw() == drawn[1]


def test_what_a_killed_run_has_left_is_removed(base: ModelConfig, server: FakeVllm, tmp_path: Path) -> None:
    killed = Training(base, tmp_path / "run", server)
    killed.engine.update_weights()
    other = Training(base, tmp_path / "other", server)
    other.engine.update_weights()
    assert len(server.adapters) == 2
    again = Training(base, tmp_path / "run", server)
    assert len(server.adapters) == 1, "the other run's stays"
    assert not list((tmp_path / "run" / "rollout").iterdir())
    for each in (again, other):
        each.engine.close()


def test_what_is_dropped_is_not_computed_on(start: Start, server: FakeVllm) -> None:
    training = start(server)
    training.engine.update_weights()
    training.engine.submit([replace(REQUESTS[0], slot=slot) for slot in range(50)], Sampling())
    training.engine.sleep()
    assert training.engine.poll() == []
    assert training.draw() == training.draw(), "answers to what was dropped do not come later"
