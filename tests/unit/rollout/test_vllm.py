"""What servers with vLLM's interface draw, and servers that sample from another policy than the trainer's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm
from served import ENDS, LORA, PROMPTS, REQUESTS, Start, small_model
from transformers import AutoTokenizer, PretrainedConfig

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.config.vllm import logprobs_mode
from grpo_dist.distributed.watch import Interrupted
from grpo_dist.model.attention import RowLayout
from grpo_dist.model.policy import Policy
from grpo_dist.rollout import Request, RowDecoder, Sampling, decode_all, sample
from grpo_dist.rollout.sampling import sampling_with
from grpo_dist.rollout.stop import stop_strings
from grpo_dist.rollout.vllm.messages import completion_message, read_answer, seed_of


def test_what_is_drawn_is_the_policys(start: Start, server: FakeVllm) -> None:
    training = start(server, temperature=0.7)
    training.engine.update_weights()
    drawn = sample(training.engine, REQUESTS, Sampling(0.7))
    assert [(each.group, each.sample) for each in drawn] == [(each.group, each.sample) for each in REQUESTS]
    for request, each in zip(REQUESTS, drawn, strict=True):
        assert each.finished == (each.ids[-1] in ENDS) and len(each.ids) <= 6
        assert each.logprobs == pytest.approx(scores(training.policy, request.prompt, each.ids, 0.7), abs=1e-4)
    assert training.engine.metrics()["rollout/probe_gap"] <= 1e-4


def test_stop_strings_and_bans_are_the_trainers(start: Start, server: FakeVllm) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.path)
    free = decode_all(RowDecoder(ENDS, 6), server.base, REQUESTS)
    rollout = {"stop": [*"acegikmoqsuwy02468"], "min_new_tokens": 2, "banned_tokens": [free[1].ids[0]]}
    server.most_stops = 99  # as VLLM_MAX_STOP_STRINGS allows
    training = start(server, **rollout)
    training.engine.update_weights()
    sampling = sampling_with(training.config.rollout, tokenizer, ENDS, PretrainedConfig(vocab_size=257))
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
    reset = "/reset_prefix_cache?reset_running_requests=true"
    assert lora is not None or server.calls.count(reset) == 4, "its blocks are of older weights"
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
