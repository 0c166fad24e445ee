"""Small models under both attentions, requests of them, and what the plain engine draws."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.model import attention
from grpo_dist.model.block_attention import block_layout
from grpo_dist.rollout import NativeDecoder, PagedDecoder, Request, RowDecoder, Sampling, decode_all, paged_obstacle
from grpo_dist.types import Trajectory

TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY), "qwen2": Qwen2Config(**TINY), "qwen3": Qwen3Config(**TINY, head_dim=16),
    "gemma": GemmaConfig(**{**TINY, "num_key_value_heads": 1}, head_dim=8),
    "mistral": MistralConfig(**TINY, sliding_window=512),
}  # fmt: skip
ENDS = [2, 3, 17]
MOST = 36
"""More than one chunk of slots, so that the cache has to grow."""
with_paged = pytest.mark.skipif(paged_obstacle() is not None, reason=str(paged_obstacle()))
ENGINES = [NativeDecoder(ENDS, MOST, 200), pytest.param(PagedDecoder(ENDS, MOST, 200), marks=with_paged)]


@dataclass(frozen=True)
class Pair:
    """One random model under both attentions."""

    shared: nn.Module
    plain: nn.Module


def make_pair(config: PretrainedConfig) -> Pair:
    """The same weights under both attentions; the head is scaled up, else all draws are uniform."""
    torch.manual_seed(0)
    shared = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention.NAME).eval()
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if "embed" in name or "head" in name else 0.2)
        row, layout = torch.arange(9)[None], block_layout([(9, [])])
        hidden = shared.base_model(input_ids=row, position_ids=row, use_cache=False, layout=layout).last_hidden_state
        head = shared.get_output_embeddings().weight
        head.mul_(2.0 / (hidden @ head.T).std())
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    plain.load_state_dict(shared.state_dict())
    return Pair(shared, plain)


def make_requests(sizes: list[int], lengths: list[int]) -> list[Request]:
    """Groups of `sizes` completions of random prompts of `lengths` tokens."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(4, 61, (length,), generator=generator).tolist() for length in lengths]
    return [Request(group, sample, prompts[group], stream_key(11, "train/0", group, sample))
            for group, size in enumerate(sizes) for sample in range(size)]  # fmt: skip


REQUESTS = make_requests([4, 4, 1, 3, 4], [3, 20, 7, 1, 12])


def exactly(request: Request, length: int) -> Request:
    """The request for so many tokens, whatever they are."""
    return replace(request, max_new_tokens=length, ignore_end=True)


@functools.cache
def drawn_by_rows(pair: Pair, sampling: Sampling | None = None) -> list[Trajectory]:
    """What the plain engine draws for REQUESTS: it knows nothing of other requests, and is what tests compare with."""
    return decode_all(RowDecoder(ENDS, MOST), pair.plain, REQUESTS, sampling or Sampling())


def assert_equal(got: list[Trajectory], expected: list[Trajectory]) -> None:
    """The same tokens in the same order, and the same log-probabilities to 1e-4."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert (one.group, one.sample, one.ids, one.finished) == (other.group, other.sample, other.ids, other.finished)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
