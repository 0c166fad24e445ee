"""Checkpoints in FP8 and MXFP4 are trained on as the plain models that they stand for."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import write_fp8, write_mxfp4
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo_dist.config.schema import Config, LoraConfig, ModelConfig, RolloutConfig
from grpo_dist.model.config_files import load_model_config, load_tokenizer
from grpo_dist.model.dequantization import describe_dequantized, form_of
from grpo_dist.model.export import choose_dtype, save_final
from grpo_dist.model.files import UnfitModel, require_fit_files
from grpo_dist.model.load import load_causal_lm, load_policy

WRITERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {"fp8": write_fp8, "mxfp4": write_mxfp4}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def needs_fp8() -> None:
    """Older releases of transformers load FP8 only where Triton is."""
    try:
        importlib.import_module("transformers.integrations.finegrained_fp8")
    except ModuleNotFoundError as error:
        pytest.skip(f"transformers does not load FP8 here: {error}")


@pytest.fixture(scope="module", params=WRITERS)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The form, the checkpoint, and the values that it stands for."""
    if request.param == "fp8":
        needs_fp8()
    path = tmp_path_factory.mktemp(request.param)
    return request.param, path, WRITERS[request.param](path)


def plain_model(path: Path, values: dict[str, Tensor]) -> Any:
    """The model that was never quantised, with these values."""
    config = copy.deepcopy(load_model_config(ModelConfig(str(path))))
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    stored = {name: tensor for name, tensor in load_file(path / "model.safetensors").items()
              if tensor.dtype == torch.float32 and not name.endswith("_scale_inv")}  # fmt: skip
    report = model.load_state_dict(stored | values, strict=False)
    assert not report.unexpected_keys
    return model


def test_the_base_has_the_values_of_the_checkpoint(packed: Any) -> None:
    form, path, values = packed
    model: Any = load_causal_lm(ModelConfig(str(path)), torch.float32, "eager").eval()
    plain, ids = plain_model(path, values), torch.randint(256, (2, 9))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in values.items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert form_of(model) == form and {p.dtype for p in model.parameters()} == {torch.float32}
    size = sum(p.numel() for p in plain.parameters()) * 4 / 2**20
    assert f"the checkpoint in {form} is dequantised when it is loaded, and takes {size:,.1f} MiB" in (
        describe_dequantized(model, form)
    )
    assert not hasattr(model.config, "quantization_config")


def test_adapters_learn_as_on_the_plain_model(packed: Any, tmp_path: Path) -> None:
    form, path, values = packed
    policy = load_policy(ModelConfig(str(path)), LORA, torch.float32, "eager")
    plain_model(path, values).save_pretrained(tmp_path / "plain")
    plain = load_policy(ModelConfig(str(tmp_path / "plain")), LORA, torch.float32, "eager")
    ids, gradients = torch.randint(256, (2, 9)), []
    for each in (policy, plain):
        each.causal_lm(input_ids=ids).logits.logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in each.model.named_parameters() if p.grad is not None})
    assert gradients[0] and all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        expected = policy.causal_lm(input_ids=ids).logits
    assert f"(the base dequantised from {form})" in choose_dtype(policy, True)[1]
    save_final(policy, load_tokenizer(ModelConfig(str(path))), tmp_path / "final", True)
    assert "quantization_config" not in json.loads((tmp_path / "final" / "config.json").read_text())
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(final.eval()(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def check(path: Path, **options: Any) -> None:
    config = Config(model=ModelConfig(str(path), **options.pop("model", {})), **options)
    require_fit_files(config, path, json.loads((path / "config.json").read_text()), 1, False)


def test_what_does_not_go_with_it_is_refused_by_name(packed: Any) -> None:
    form, path, _ = packed
    small: dict[str, Any] = {"rollout": RolloutConfig(max_completion_length=8)}
    data = Config().data
    data.max_prompt_length = 64
    check(path, data=data, **small)
    with pytest.raises(UnfitModel, match=f"model.quantization: 'nf4' given.*is quantised already, in {form}"):
        check(path, data=data, model={"quantization": "nf4"}, **small)


def test_scales_that_are_not_used_are_noticed(tmp_path: Path) -> None:
    """FP8 with one scale a layer has another name for it, and another meaning."""
    needs_fp8()
    write_fp8(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("weight_scale_inv", "weight_scale"): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    data = Config().data
    data.max_prompt_length = 64
    with pytest.raises(UnfitModel, match="no tensor"):
        check(tmp_path, data=data, rollout=RolloutConfig(max_completion_length=8))
    with pytest.raises(UnfitModel, match=r"uses none of 14 scales|quantised"):
        load_causal_lm(ModelConfig(str(tmp_path)), torch.float32, "eager")
