"""Checkpoints that bitsandbytes has quantised: what trains on them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_models import bnb, dequantised, moved
from small_models import LORA, logits, make_base, make_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from grpo_dist.config.schema import Config, ModelConfig
from grpo_dist.model.checks import bitsandbytes_config
from grpo_dist.model.config_files import check_model_config, load_model_config
from grpo_dist.model.files import UnfitModel, require_quantizable
from grpo_dist.model.fused_modules import plain_modules
from grpo_dist.model.load import load_causal_lm, try_blank
from grpo_dist.model.quantized import EightBitLinear, quantized_layers
from grpo_dist.model.rollout_weights import RolloutModel


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A small model with tied embeddings."""
    return make_base(tmp_path_factory.mktemp("base"), tied=True)


CHECKPOINTS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "nf4 once": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, base: ModelConfig, tmp_path: Path) -> ModelConfig:
    """The small model, as bitsandbytes quantises and transformers saves it."""
    model = AutoModelForCausalLM.from_pretrained(
        base.name, quantization_config=CHECKPOINTS[request.param], device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return ModelConfig(name=str(tmp_path), dtype="float32")


def test_checkpoints_of_bitsandbytes_are_trained_on(checkpoint: ModelConfig) -> None:
    config = Config(model=checkpoint, lora=LORA)
    model_config = load_model_config(checkpoint)
    check_model_config(model_config, make_tokenizer(), 16)
    require_quantizable(config, bitsandbytes_config(model_config))
    assert try_blank(checkpoint, LORA, model_config, None) is None
    loaded = load_causal_lm(checkpoint, torch.float32, None)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=torch.float32, device_map={"": "cpu"})
    assert len(quantized_layers(loaded)) == 14
    for name, layer in quantized_layers(loaded).items():
        weight = theirs.get_submodule(name).weight
        if isinstance(layer, EightBitLinear):
            expected = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
            torch.testing.assert_close(layer.weight, expected.float(), rtol=1e-6, atol=0)
        else:
            expected = dequantised(weight)
            assert expected.dtype == torch.bfloat16 and torch.equal(layer.weight.bfloat16(), expected)
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {torch.float32}
    policy = moved(loaded)
    weights = RolloutModel(policy, torch.float32, None)
    weights.dequantize()
    with weights.open() as rollout, plain_modules():  # the trainer's kernels round otherwise
        assert torch.equal(logits(rollout, shared=False), logits(policy.causal_lm, shared=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": None}, r"lora: null given with a checkpoint in \S+ \(bitsandbytes\), expected adapters"),
        ({"quantization": "other"}, r"model\.quantization: '\S+' given, expected null: the checkpoint .* in \S+"),
    ],
)
def test_what_cannot_go_with_a_quantised_checkpoint(
    change: dict[str, str | None], message: str, checkpoint: ModelConfig
) -> None:
    model_config = load_model_config(checkpoint)
    config = Config(model=checkpoint, lora=LORA)
    if "lora" in change:
        config = replace(config, lora=None)
    else:
        is_int8 = model_config.quantization_config.get("load_in_8bit")
        config.model.quantization = "nf4" if is_int8 else "int8"
    with pytest.raises(UnfitModel, match=message):
        require_quantizable(config, bitsandbytes_config(model_config))


def test_a_config_that_says_quantised_of_plain_weights(base: ModelConfig, tmp_path: Path) -> None:
    for file in Path(base.name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    given = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_config": given}))
    model = ModelConfig(name=str(tmp_path))
    with pytest.raises(UnfitModel, match=r"weights are not quantised: remove it there, and set model\.quantization"):
        try_blank(model, LORA, load_model_config(model), None)
