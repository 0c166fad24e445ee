"""What a pack costs on the simulated device: kernels, waits of the host and copies, as JSON.

    python tests/unit/simulated_packs.py > RESULT.json

Kernels do not depend on sizes. So the model has tiny ones, and a pack of 4 x (256 + 16 x 240) tokens is one of
4 x (3 + 16 x 2); the head computes as many chunks of logits as with 151,936 entries. Every layer takes as many kernels
as another, so that 28 layers follow from 1 and 2.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from cuda_formulas import KERNELS
from simulated_cuda import install
from simulated_device import CUDA, SEEN
from simulated_kernels import put_triton_in

install()
put_triton_in()

from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

from grpo_dist.config.schema import LoraConfig, ModelConfig  # noqa: E402
from grpo_dist.model import attention, logprobs  # noqa: E402
from grpo_dist.model.attention import RowLayout  # noqa: E402
from grpo_dist.model.flash_trial import flash_obstacle  # noqa: E402
from grpo_dist.model.layout import AttentionOptions  # noqa: E402
from grpo_dist.model.load import make_policy  # noqa: E402
from grpo_dist.planning.tracing import example_pack  # noqa: E402

FLASH = torch.ops.aten._flash_attention_forward.default
plain = KERNELS[FLASH]
LAYERS, VOCABULARY, CHUNKS = 28, 64, 9
SHAPE = ((3, (2,) * 16),) * 4


def make_model(num_layers: int) -> Any:
    """A policy under adapters, as a training has it, with adapters that do something, on the CPU."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.bfloat16)
    policy = make_policy(base, ModelConfig(name="none"), LoraConfig())
    policy.fused_head = True
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return policy.train()


def counted(function: Any) -> dict[str, Any]:
    """Kernels of a call, and its waits by kind and place."""
    SEEN.kernels = 0
    SEEN.syncs.clear()
    function()
    return {"kernels": SEEN.kernels, "waits": [[*key, count] for key, count in SEEN.syncs.items()]}


def of_attention(window: int | None) -> dict[str, Any]:
    """Attention of one layer, forward and backward."""
    tokens = sum(prompt + sum(completions) for prompt, completions in SHAPE)
    rows = [torch.randn(1, tokens, heads, 8).transpose(1, 2).bfloat16().to(CUDA).requires_grad_()
            for heads in (4, 2, 2)]  # fmt: skip
    incoming = torch.randn(1, tokens, 4, 8).bfloat16().to(CUDA)
    layout = RowLayout([(prompt, list(completions)) for prompt, completions in SHAPE], CUDA)

    def both() -> None:
        torch.autograd.grad(layout.attend(0, *rows, AttentionOptions(window=window)), rows, incoming)

    both()  # its tables travel, and the kernels are tried
    return counted(both) | {"blocks": len(layout._blocks)}


def main() -> None:
    """Count everything."""
    some, more = of_passes(1), of_passes(2)
    passes = {name: {"kernels": one["kernels"] + (LAYERS - 1) * (more[name]["kernels"] - one["kernels"]),
                     "waits": one["waits"]} for name, one in some.items()}  # fmt: skip
    result: dict[str, Any] = passes | {"attention": of_attention(None), "window": of_attention(4)}
    KERNELS[FLASH] = lambda *given, **options: plain(*given[:8], False, *given[9:], **options)
    flash_obstacle.cache_clear()
    result["wrong kernels"] = of_attention(None) | {"reason": flash_obstacle(torch.bfloat16, 8, 2)}
    print(json.dumps(result | {"error": error()}))


def error() -> float:
    """How far the adapters' gradients on the device in bfloat16 are from those of the CPU in float32, as a share."""
    pack, grads = example_pack(SHAPE, share_prompts=True), []
    ids = torch.randint(VOCABULARY, pack.ids.shape, generator=torch.Generator().manual_seed(0))
    pack = dataclasses.replace(pack, ids=ids, targets=ids[pack.predictor])
    for each, device in ((make_model(2).float(), torch.device("cpu")), (make_model(2).to(CUDA), CUDA)):
        scores, _, _ = each(pack.to(device))
        (scores * torch.linspace(-1, 1, len(scores)).to(device)).sum().backward()
        grads.append(torch.cat([x.grad.cpu().float().flatten() for x in each.parameters() if x.grad is not None]))
    return float((grads[1] - grads[0]).norm() / grads[0].norm())


def of_passes(num_layers: int) -> dict[str, Any]:
    """The forward and backward pass of an update, and the forward pass of the reference."""
    policy, pack = make_model(num_layers).to(CUDA), example_pack(SHAPE, share_prompts=True)
    logprobs.CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": -(-len(pack.targets) // CHUNKS) * VOCABULARY}

    def update() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            scores, _, _ = policy(pack.to(CUDA))
        scores.mean().backward()

    def reference() -> None:
        with torch.no_grad(), policy.model.disable_adapter():
            policy(pack.to(CUDA))

    update()  # kernels are tried; from here on gradients are there to be added to
    reference()
    return {"update": counted(update), "reference": counted(reference)}


if __name__ == "__main__":
    main()
