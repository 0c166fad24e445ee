"""The toy model with tools, with attention heads as wide as vLLM takes them on a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo_dist.model.toy import toy_path

HEADS = {"q_proj": 4, "k_proj": 2, "v_proj": 2}


def write_with_wide_heads(target: Path) -> None:
    """Write toy-tools with heads of 32 in place of 16: the same function, as a Llama model.

    Each half of a head gets zeros behind it. A head's rotations have the frequencies theta ** (-2i / width), so that
    twice the width has the same ones with theta squared. Scores are divided by the root of the width, for which queries
    make up. vLLM takes such heads for Llama alone: its Qwen2 ignores `head_dim`.
    """
    shutil.copytree(toy_path("toy-tools"), target)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 32, "attention_bias": True,
               "dtype": "float32"}  # fmt: skip
    config["rope_parameters"]["rope_theta"] **= 2
    (target / "config.json").write_text(json.dumps(config))
    state = load_file(target / "model.safetensors")
    wide = {name: _widened(name, value.float()) for name, value in state.items()}
    for number in range(config["num_hidden_layers"]):
        wide[f"model.layers.{number}.self_attn.o_proj.bias"] = torch.zeros(config["hidden_size"])
    save_file(wide, target / "model.safetensors", {"format": "pt"})


def _widened(name: str, value: Tensor) -> Tensor:
    layer = name.split(".")[-2]
    if layer in HEADS:
        rows = value.view(HEADS[layer], 2, 8, -1)
        wide = torch.cat([rows, torch.zeros_like(rows)], dim=2).reshape(HEADS[layer] * 32, -1)
        wide = wide * 2**0.5 if layer == "q_proj" else wide
        return wide.reshape(-1, *value.shape[1:]).contiguous()
    if layer == "o_proj":  # without a bias
        columns = value.view(-1, 4, 2, 8)
        return torch.cat([columns, torch.zeros_like(columns)], dim=3).reshape(value.shape[0], -1).contiguous()
    return value
