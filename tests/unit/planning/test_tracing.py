"""What a traced pass counts, against the same passes on real tensors."""

from __future__ import annotations

import pytest
import torch
from toy_config import config_of

from grpo_dist.config.schema import Config, LoraConfig, ModelConfig, ReferenceConfig
from grpo_dist.model import attention
from grpo_dist.model.config_files import load_model_config
from grpo_dist.model.load import load_policy, trainable
from grpo_dist.model.policy import PolicyOptions
from grpo_dist.planning.live import LiveBytes
from grpo_dist.planning.memory import ModelCounts
from grpo_dist.planning.predict import Predictor
from grpo_dist.planning.tracing import Precision, build_policy, count, example_pack


def test_counts_are_those_of_the_loaded_model() -> None:
    """The toy's embeddings are tied, and its adapters are on every linear layer but the head."""
    config = config_of()
    model_config = load_model_config(config.model)

    def counted(config: Config) -> ModelCounts:
        precision = Precision(torch.float32, torch.float32, False)
        return count(build_policy(config, model_config, attention.NAME, precision))

    real = load_policy(config.model, config.lora, torch.float32, attention.NAME)
    counts = counted(config)
    assert counts == count(real)
    assert counts.parameters + counts.adapters == sum(p.numel() for p in real.parameters())
    assert counts.adapters == sum(p.numel() for p in trainable(real).values())
    for_all = counted(config_of(lora=None))
    assert (for_all.parameters, for_all.adapters, for_all.adapted) == (counts.parameters, 0, 0)
    ends = tuple(f"{letter}_proj.base_layer.weight" for letter in "qkv")
    of_heads = [parameter for name, parameter in real.named_parameters() if name.endswith(ends)]
    assert counts.joined == for_all.joined == sum(p.numel() for p in of_heads) > 0
    some = config_of(lora=LoraConfig(r=3, target_modules=["q_proj"]))
    width = model_config.hidden_size
    few = counted(some)
    assert few.adapters == model_config.num_hidden_layers * 3 * 2 * width
    assert few.adapted == model_config.num_hidden_layers * width**2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [LoraConfig(), None])
def test_a_traced_pass_holds_what_the_real_one_does(checkpointing: bool, lora: LoraConfig | None) -> None:
    model = ModelConfig(gradient_checkpointing=checkpointing)
    config = config_of(model=model, lora=lora, reference=ReferenceConfig(dtype="float32"))
    predicted = Predictor(config, load_model_config(model), "cpu").inputs(2, "DDP").passes
    policy = load_policy(model, lora, torch.float32, attention.NAME, PolicyOptions.of(config))
    policy.train().fused_head = True
    pack = example_pack(((40, (23,) * 4),) * 3, True)
    assert len(pack.ids) <= 400
    for parameter in trainable(policy).values():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        logprobs, entropies, _ = policy(pack)
        (logprobs.sum() + (entropies.sum() if entropies.requires_grad else 0)).backward()
    assert live.peak == pytest.approx(predicted.update, rel=0.01)


def test_live_bytes_follow_live_tensors() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        a = before * 2
        view = a[:10]
        assert live.now == 4000
        b = a + 1
        del a
        assert live.now == 8000  # the view still holds it
        del view, b
        c = torch.zeros(10)
    assert (live.now, live.peak) == (40, 8000) and len(c) == 10
