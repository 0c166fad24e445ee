"""Small random models and a tokenizer, for tests of whatever loads or trains a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model import attention
from grpo_dist.model.block_attention import block_layout
from grpo_dist.model.load import load_policy, trainable
from grpo_dist.model.policy import Policy
from grpo_dist.trainer.gathering import gather_trajectories
from grpo_dist.types import Batch, Prompt, Trajectory

IDS = torch.tensor([5, 9, 33, 60, 7, 12, 80, 41])
LORA = LoraConfig(r=3, alpha=6.0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, an end token, and no padding token."""
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A small random Qwen2 on the disk, with tied embeddings and without, and several end tokens."""
    return make_base(tmp_path_factory.mktemp("base"), request.param)


def make_base(path: Path, tied: bool) -> ModelConfig:
    """Write the model of `base`."""
    config = Qwen2Config(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, eos_token_id=250,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.generation_config = GenerationConfig(eos_token_id=[256, 7, 9])
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return ModelConfig(name=str(path))


def make_policy(base: ModelConfig, lora: LoraConfig | None) -> Policy:
    """A policy that training has moved away from its base."""
    policy = load_policy(base, lora, torch.float32, attention.NAME)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(policy).values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return policy.eval()


@torch.no_grad()
def logits(model: nn.Module, shared: bool = True) -> Tensor:
    """Logits of one fixed sequence; `shared` for a model with the package's attention."""
    layout = {"layout": block_layout([(len(IDS), [])])} if shared else {}
    return model(input_ids=IDS[None], position_ids=torch.arange(len(IDS))[None], use_cache=False, **layout).logits[0]


def make_moved(base: ModelConfig, dtype: torch.dtype, moved: float) -> Policy:
    """A policy whose adapters have learned: every entry of B has moved so far."""
    policy = load_policy(base, LORA, dtype, attention.NAME).eval()
    torch.manual_seed(1)
    for name, parameter in trainable(policy).items():
        if "lora_B" in name:
            parameter.data.add_(torch.randn(parameter.shape).sign() * moved)
    return policy


class OneRank:
    """What `gather_trajectories` asks of ranks, where all completions are here."""

    def gather(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        return tensor


def batch_of(prompts: list[Prompt], trajectories: list[Trajectory], nothing_routed: Tensor | None = None) -> Batch:
    """The batch as one rank gathers it, without rewards."""
    return gather_trajectories(OneRank(), prompts, trajectories, nothing_routed=nothing_routed)  # type: ignore
