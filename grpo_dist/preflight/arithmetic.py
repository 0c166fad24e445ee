"""What a config's counts come to, worked out on the prompts of the first step."""

from __future__ import annotations

import math

import torch

from ..config import Config
from ..models import packing_obstacle
from ..packing import plan
from .contents import Contents
from .findings import Findings


def describe_steps(config: Config, found: Contents, num_ranks: int | None, findings: Findings) -> None:
    """Note completions, packs and updates of a step on `num_ranks`; None stands for as many as there are GPUs."""
    ranks = num_ranks or max(1, torch.cuda.device_count())
    train, rollout = config.train, config.rollout
    total = train.batch_size * rollout.group_size
    updates = train.updates_per_batch * train.num_minibatches
    share = math.ceil(total / ranks)
    lines = [
        f"{train.batch_size} prompts × {rollout.group_size} = {total} completions, "
        f"up to {share} on each of {ranks} rank(s)",
        f"{updates} update(s) a step, {updates * train.num_train_steps} in all",
    ]
    if total < ranks:
        findings.remarks.append(f"{total} completions a step cannot keep {ranks} ranks busy: raise train.batch_size")
    if found.prompts:
        epochs = train.num_train_steps * train.batch_size / len(found.prompts)
        lines.append(f"{train.num_train_steps} steps: {epochs:.2f} times through the {len(found.prompts)} prompts")
        if train.batch_size > len(found.prompts):
            findings.remarks.append(f"train.batch_size: {train.batch_size} prompts a step, but there are only "
                                    f"{len(found.prompts)}: some come more than once in a step")  # fmt: skip
    if found.prompts and found.tokenizer is not None and found.model_config is not None:
        lines += _packs(config, found, ranks)
    findings.facts["steps"] = lines


def _packs(config: Config, found: Contents, ranks: int) -> list[str]:
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    obstacle = packing_obstacle(found.model_config, longest, config.model.trust_remote_code)
    if config.model.attn_implementation != "auto":
        obstacle = f"model.attn_implementation is {config.model.attn_implementation}"
    prompts = [len(found.prompts[place].ids) for place in found.sampler.batch_indices(0)]
    group = [place for place in range(len(prompts)) for _ in range(config.rollout.group_size)]
    lengths = [config.rollout.max_completion_length] * len(group)
    packs = plan(prompts, group, lengths, [True] * len(group), max_tokens=config.train.max_tokens_per_pack,
                 num_ranks=ranks, share_prompts=obstacle is None)  # fmt: skip
    lines = [f"at most {len(packs[0])} pack(s) of {config.train.max_tokens_per_pack} tokens on each rank, where all "
             "completions are of full length"]  # fmt: skip
    return lines + ([f"completions are computed one to a row: {obstacle}"] if obstacle else [])
