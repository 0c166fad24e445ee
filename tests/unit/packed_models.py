"""Tiny checkpoints in the forms in which quantised models are published, and the values that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_experts import make_experts
from small_models import make_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
"""The values of the 4 bits of MXFP4 (sign, two of the exponent, one of the fraction)."""
BLOCK = 16
"""Rows and columns of a block of FP8 with a scale; 128 in published ones."""
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_mxfp4(path: Path) -> dict[str, Tensor]:
    """A gpt-oss model as OpenAI has published it: experts in MXFP4, all else in the model's dtype. Returns the experts'
    values by name, (E, inputs, outputs) float32."""
    make_experts(path, "gpt_oss", hidden_size=32, intermediate_size=32, head_dim=8)
    state, values = load_file(path / "model.safetensors"), {}
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = state.pop(name).shape
        nibbles = torch.randint(16, (experts, outputs, inputs))
        scales = torch.randint(120, 125, (experts, outputs, inputs // 32))
        pairs = nibbles.view(experts, outputs, inputs // 32, 16, 2)
        state[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
        state[f"{name}_scales"] = scales.to(torch.uint8)
        values[name] = torch.tensor(
            [[[FP4[nibbles[e, o, i]] * 2.0 ** (int(scales[e, o, i // 32]) - 127) for o in range(outputs)]
              for i in range(inputs)] for e in range(experts)]
        )  # fmt: skip
    _rewrite(path, state, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return values


def write_fp8(path: Path) -> dict[str, Tensor]:
    """A Qwen3 model as Qwen publishes it in FP8: linear layers in E4M3, with a scale for each block. Returns these
    layers' values by name, float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
                                  eos_token_id=256, bos_token_id=None, pad_token_id=0,
                                  initializer_range=0.3)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    state, values = load_file(path / "model.safetensors"), {}
    for name in [name for name in state if name.split(".")[-2] in LAYERS]:
        weight = state[name]
        rows, columns = (length // BLOCK for length in weight.shape)
        scales, codes = torch.empty(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        values[name] = torch.empty(weight.shape)
        for i in range(rows):
            for j in range(columns):
                block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
                scales[i, j] = weight[block].abs().max() / 448
                codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
                values[name][block] = codes[block].float() * scales[i, j]
        state |= {name: codes, f"{name}_scale_inv": scales}
    _rewrite(path, state, {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                           "weight_block_size": [BLOCK, BLOCK]})  # fmt: skip
    return values


def _rewrite(path: Path, state: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    entries = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(entries | {"quantization_config": quantization}))
