"""The table of architectures in docs/models.md: a tiny model of each type is treated as its line says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, THROUGH, Architecture, reasons, table
from packaging.version import Version
from small_models import batch_of
from tiny_configs import tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.config.schema import LoraConfig, ModelConfig, RolloutConfig
from grpo_dist.model.checks import adapter_targets, require_trainable
from grpo_dist.model.files import UnfitModel
from grpo_dist.model.load import attention_for, blank_causal_lm, make_policy, trainable
from grpo_dist.model.packing import Piece, make_pack
from grpo_dist.model.policy import Policy
from grpo_dist.model.rollout_weights import RolloutModel
from grpo_dist.rollout import Request, Sampling, awake, sample
from grpo_dist.rollout.choose import make_engine
from grpo_dist.rollout.own_attention import settle_attention
from grpo_dist.types import Prompt, Trajectory

DOCUMENTED = "5.24"
"""The release of transformers that the page is about."""
LONGEST = 64
TOKENS = {"vocab_size": 512, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}
PROMPTS = [Prompt(n, [(5 * k + n) % 57 + 3 for k in range(length)], "") for n, length in enumerate((3, 15))]
REQUESTS = [
    Request(group, copy, PROMPTS[group].ids, stream_key(0, group, copy)) for group in range(2) for copy in range(2)
]
QUICK = ("llama", "gemma2", "qwen3_moe", "lfm2", "qwen3_vl")
"""One of each sort; the others are slow tests."""

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version(DOCUMENTED), reason=f"the page is about transformers {DOCUMENTED}"
)


def alone(thing: Any) -> list[Any]:
    """What all ranks say, where there is one."""
    return [thing]


@torch.no_grad()
def largest_gap(policy: Policy, trajectories: list[Trajectory], share_prompts: bool) -> float:
    """Between the log-probabilities of an update and those of the rollout (nats)."""
    batch = batch_of(PROMPTS, trajectories)
    together = [[Piece(0, [0, 1]), Piece(1, [2, 3])]]
    packs = together if share_prompts else [[Piece(int(batch.group[n]), [n])] for n in range(len(trajectories))]
    computed = torch.full((len(batch.tokens),), torch.nan)
    for pieces in packs:
        pack = make_pack(batch, pieces, share_prompts=share_prompts)
        computed[pack.token] = policy(pack)[0]
    return float((computed - batch.sampled_logprobs).abs().max())


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "line", [pytest.param(each, id=each.kind, marks=() if each.kind in QUICK else pytest.mark.slow)
             for each in ARCHITECTURES],
)  # fmt: skip
def test_the_line_says_what_is_done(line: Architecture) -> None:
    config, model = tiny_config(line.kind, TOKENS), ModelConfig(name=line.kind)
    if line.refused is not None:
        with pytest.raises(UnfitModel, match=line.refused):
            require_trainable(config, LONGEST)
        return
    require_trainable(config, LONGEST)
    implementation, obstacle = attention_for(model, config, LONGEST)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    blank = blank_causal_lm(model, config, torch.float32, implementation)
    assert reasons(adapter_targets(blank, "all-linear")[1]) == line.without

    policy = make_policy(base, model, LoraConfig(r=2, alpha=2.0)).eval()
    for parameter in trainable(policy).values():  # adapters that do something
        parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    weights = RolloutModel(policy, torch.float32, implementation)
    with weights.open() as own:
        obstacle = settle_attention([policy.causal_lm, own], implementation, obstacle, False, alone)
    assert (obstacle is None) == (line.rows is None) and (line.rows or "") in (obstacle or "")
    engine = make_engine(weights, obstacle, [1], RolloutConfig(max_completion_length=8, engine="native"), alone)
    assert engine.decoding["decoding"] == (line.step if line.rows is None else None)
    with awake(engine):
        drawn = sample(engine, REQUESTS, Sampling())
    assert largest_gap(policy, drawn, share_prompts=obstacle is None) < 1e-3


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert table() in page, "run: python docs/architectures.py"


ASK = """
import json, sys
import transformers
from vllm.model_executor.models.registry import ModelRegistry
answers = {}
for name in json.load(sys.stdin):
    if name in ModelRegistry.get_supported_archs():
        known = ModelRegistry.models[name]
        how = "through transformers" if known.module_name.endswith(".transformers") else "own code"
        try:
            takes_adapters = known.load_model_cls().supports_lora
        except ImportError:  # what it needs for images
            takes_adapters = True
        answers[name] = how if takes_adapters else how + ", without LoRA"
    else:
        theirs = getattr(transformers, name, None)
        fits = theirs is not None and theirs._can_set_attn_implementation()
        answers[name] = "through transformers" if fits else None
print(json.dumps(answers))
"""


@pytest.mark.slow
@pytest.mark.skipif("GRPO_DIST_VLLM" not in os.environ, reason="GRPO_DIST_VLLM does not name the Python of vLLM")
def test_vllm_serves_what_the_lines_say() -> None:
    names = {each.kind: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[each.kind] for each in ARCHITECTURES if not each.refused}
    done = subprocess.run([os.environ["GRPO_DIST_VLLM"], "-c", ASK], input=json.dumps([*names.values()]), text=True,
                          capture_output=True, check=True)  # fmt: skip
    answers = json.loads(done.stdout.splitlines()[-1])
    assert THROUGH in answers.values()
    assert {kind: answers[name] for kind, name in names.items()} == {
        each.kind: each.vllm for each in ARCHITECTURES if not each.refused
    }
