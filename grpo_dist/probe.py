"""Does a model compute packs with shared prompts as it computes sequences one by one? Asked of the model itself.

An architecture that ignores the layout (state-space layers, linear attention, attention code of its own) would train on
wrong numbers without a word. Two questions settle it: changing one completion must not move another's output by a
single bit, and each output must be what the sequence gives alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import block_layout

PROMPT, COMPLETIONS = 5, (4, 3)


@torch.no_grad()
def _outputs(model: nn.Module, ids: Tensor, positions: Tensor, completions: tuple[int, ...]) -> Tensor:
    layout = block_layout([(PROMPT, list(completions))]).to(ids.device)
    output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=layout)
    return torch.log_softmax(output.logits[0].float(), -1)


def packing_leak(model: nn.Module) -> str | None:
    """Why packs with shared prompts are wrong for this model, or None where they are right.

    `model` was loaded with `attention.NAME` and holds its whole weights; a few tiny forward passes.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, second = COMPLETIONS
    ids = (torch.arange(PROMPT + first + second, device=device) * 7 + 3) % vocabulary
    after = torch.arange(PROMPT, PROMPT + max(COMPLETIONS), device=device)
    positions = torch.cat([torch.arange(PROMPT, device=device), after[:first], after[:second]])
    try:
        packed = _outputs(model, ids, positions, COMPLETIONS)
        changed = ids.clone()
        changed[PROMPT : PROMPT + first] = (changed[PROMPT : PROMPT + first] + 1) % vocabulary
        disturbed = _outputs(model, changed, positions, COMPLETIONS)
        alone_ids = torch.cat([ids[:PROMPT], ids[PROMPT + first :]])
        alone_positions = torch.cat([positions[:PROMPT], positions[PROMPT + first :]])
        alone = _outputs(model, alone_ids, alone_positions, (second,))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"its forward pass cannot take a pack: {error}"
    other, own = slice(PROMPT + first, None), slice(PROMPT, None)
    if not torch.equal(packed[other], disturbed[other]):
        return "one completion's output depends on another completion of the pack"
    if torch.equal(packed[PROMPT], disturbed[PROMPT]):
        return "outputs do not depend on the tokens of the pack"
    tolerance = 1e-3 if packed.dtype == next(model.parameters()).dtype else 0.1
    worst = float((packed[other] - alone[own]).abs().max())
    if worst > tolerance:
        return f"log-probabilities in a pack are off by {worst:.2g}"
    return None
