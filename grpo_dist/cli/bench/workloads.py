"""Workloads of the benchmark: models with random weights whose completions end by themselves, and random prompts.

A model with random weights usually never ends a completion. Every rollout would reach the length limit, and the
benchmark would not show the effect of uneven lengths. Here one hidden dimension is a constant that only the end token's
row of the head reads. Each token then ends its completion with the same probability, and lengths are geometric.
"""

from __future__ import annotations

import json
import math
import random
import string
from dataclasses import asdict, dataclass
from pathlib import Path

PAD, END = "<pad>", "<eos>"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


MEDIUM = Shape(512, 8, 8, 2, 1536, 4096)
QWEN_0_5B = Shape(896, 24, 14, 2, 4864, 151936)
QWEN_1_5B = Shape(1536, 28, 12, 2, 8960, 151936)


@dataclass(frozen=True)
class Workload:
    """One kind of step."""

    name: str
    model: Shape | str
    """The shape of a generated model, or the name or path of a model."""
    num_prompts: int
    group_size: int
    prompt_tokens: int
    """Letters of the longest prompt. Lengths are uniform from half of it. The toy model gets sums instead."""
    max_new_tokens: int
    mean_new_tokens: int
    """Mean length of completions without the limit; only for a generated model."""
    dtype: str = "float32"


WORKLOADS = {
    w.name: w
    for w in (
        Workload("quickstart", "toy", 16, 8, 15, 16, 4),
        Workload("medium", MEDIUM, 2, 16, 256, 256, 64),
        Workload("long-prompt", MEDIUM, 2, 16, 1024, 128, 32),
        Workload("long-answers", MEDIUM, 4, 8, 32, 512, 128),
        Workload("qwen-0.5b", QWEN_0_5B, 32, 16, 256, 1024, 256, "bfloat16"),
        Workload("qwen-1.5b", QWEN_1_5B, 32, 16, 256, 1024, 256, "bfloat16"),
    )
}


def make_model(shape: Shape, mean_new_tokens: int, dtype: str, directory: Path) -> None:
    """Write a model of random weights and its tokenizer (one token a character) to `directory`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()  # a CPU takes minutes for large models, and twice the memory in float32
    device = torch.device("cuda" if on_gpu else "cpu")
    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32768, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        dtype=getattr(torch, dtype) if on_gpu else torch.float32,
    )  # fmt: skip
    with device:
        model = Qwen2ForCausalLM._from_config(config)
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[:, 0] = 5.0  # large compared with the other dimensions: after the norm the same for every token
        head[:, 0] = 0.0
        head[:2] = 0.0
        tokens = torch.randint(2, shape.vocabulary, (4, 64), device=device)
        level = float(model.base_model(tokens).last_hidden_state[..., 0].float().mean())
        head[0, 0] = -10.0 / level  # padding is not sampled
        others = model(tokens).logits[..., 2:].float().exp().sum(-1).mean()
        head[1, 0] = math.log(float(others) / (mean_new_tokens - 1)) / level
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # one entry stays free: loading makes a Qwen2 tokenizer of it, which adds a token for unknown text
    fillers = [f"<filler-{n}>" for n in range(shape.vocabulary - len(characters) - 3)]
    vocabulary = {token: n for n, token in enumerate([PAD, END, *characters, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left")
    fast.save_pretrained(directory)


def model_of(workload: Workload, directory: Path) -> str:
    """The name or path of the workload's model. A generated model is made under `directory` if it does not exist."""
    if isinstance(workload.model, str):
        return workload.model
    sizes = "-".join(map(str, asdict(workload.model).values()))
    path = directory / f"{sizes}-{workload.mean_new_tokens}-{workload.dtype}"
    if not (path / "tokenizer.json").is_file():
        make_model(workload.model, workload.mean_new_tokens, workload.dtype, path)
    return str(path)


def write_prompts(workload: Workload, num_steps: int, path: Path) -> None:
    """Write the prompts of `num_steps` steps as JSONL: random letters, or sums for the toy model."""
    drawn = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_steps * workload.num_prompts):
            if workload.model == "toy":
                prompt = f"What is {drawn.randint(0, 30)} + {drawn.randint(0, 30)}? Answer with an integer."
            else:
                length = drawn.randint(workload.prompt_tokens // 2, workload.prompt_tokens)
                prompt = "".join(drawn.choices(string.ascii_lowercase, k=length))
            file.write(json.dumps({"prompt": prompt}) + "\n")
