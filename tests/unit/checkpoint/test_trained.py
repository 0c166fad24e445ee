"""Trained models, loaded again: full fine-tuning, tied and untied embeddings, a critic, a base that is another."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_models import LORA, logits, make_base, make_moved, make_policy
from transformers import AutoModelForCausalLM

from grpo_dist.checkpoint import store as checkpoint
from grpo_dist.checkpoint.final import write_record
from grpo_dist.checkpoint.trained import find, load
from grpo_dist.cli.export import compare, write_merged
from grpo_dist.config.schema import Config, LoraConfig, ModelConfig
from grpo_dist.model import attention
from grpo_dist.model.config_files import load_model_config, load_tokenizer
from grpo_dist.model.export import save_final
from grpo_dist.model.export import write_merged as write
from grpo_dist.model.files import UnfitModel
from grpo_dist.model.load import adapted_layers, base_identity, load_policy, trainable
from grpo_dist.model.policy import Policy, PolicyOptions
from grpo_dist.model.stored_weights import weights_fingerprint


def leave_behind(
    directory: Path, model: ModelConfig, policy: Policy, lora: LoraConfig | None, critic: bool = False
) -> None:
    """What a run of one step leaves: config, metrics, a checkpoint, and its end."""
    config = asdict(Config(model=model, lora=lora))
    config["train"]["num_train_steps"] = 1
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    (directory / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    meta: dict[str, Any] = {"config": config, "dtype": str(policy.causal_lm.dtype).removeprefix("torch."),
                            "identity": {"base": base_identity(model, load_model_config(model)),
                                         "base_weights": weights_fingerprint(Path(model.name)),
                                         "critic": critic}}  # fmt: skip
    tensors = {f"weight/{name}": p.detach().float().clone() for name, p in trainable(policy).items()}
    checkpoint.save(directory / "checkpoints", 1, tensors, meta, keep=2)
    save_final(policy, load_tokenizer(model), directory / "final", is_main=True)


@pytest.mark.parametrize("place", ["final", "checkpoints/step_1"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_it_computes_what_was_trained(lora: LoraConfig | None, place: str, base: ModelConfig, tmp_path: Path) -> None:
    policy = make_policy(base, lora)
    leave_behind(tmp_path / "run", base, policy, lora)
    trained = find(tmp_path / "run" / place)
    assert trained.step == 1 and trained.run == tmp_path / "run"
    loaded, _ = load(trained)
    assert torch.allclose(logits(loaded.causal_lm, shared=False), logits(policy.causal_lm), atol=1e-5)
    gap = write_merged(trained, tmp_path / "out", None, "5GB")
    assert gap.difference <= gap.allowed == 1e-4 and gap.kl < 1e-9
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == load_model_config(base).tie_word_embeddings


def test_a_model_whose_config_names_no_dtype_is_refused(base: ModelConfig, tmp_path: Path) -> None:
    leave_behind(tmp_path / "run", base, make_policy(base, None), None)
    file = tmp_path / "run" / "final" / "config.json"
    file.write_text(json.dumps({name: each for name, each in json.loads(file.read_text()).items() if name != "dtype"}))
    with pytest.raises(UnfitModel, match="has the dtype None, expected one such as 'float32'"):
        load(find(tmp_path / "run" / "final"))


def test_the_base_is_loaded_in_the_dtype_it_was_trained_in(base: ModelConfig, tmp_path: Path) -> None:
    policy = make_moved(base, torch.bfloat16, 1e-6)
    leave_behind(tmp_path / "run", base, policy, LORA)
    assert load_model_config(ModelConfig(name=str(tmp_path / "run" / "final"))).dtype == torch.float32
    (tmp_path / "run" / "environment.jsonl").write_text('{"dtype": "float32"}\n{"dtype": "bfloat16"}\n{}\n')
    loaded, _ = load(find(tmp_path / "run" / "final"))
    assert loaded.causal_lm.dtype == torch.bfloat16
    own = [logits(model, shared=shared) for model, shared in ((loaded.causal_lm, False), (policy.causal_lm, True))]
    assert float((own[0] - own[1]).abs().max()) < 0.05
    adapted = next(iter(adapted_layers(loaded).values()))
    x = torch.randn(5, adapted.in_features, dtype=torch.bfloat16)
    same = next(iter(adapted_layers(policy).values()))
    assert torch.equal(adapted(x), same(x)) and not torch.equal(adapted(x), adapted.get_base_layer()(x))


def test_a_critic_stays_behind(base: ModelConfig, tmp_path: Path) -> None:
    policy = load_policy(base, LORA, torch.bfloat16, attention.NAME, PolicyOptions(has_critic=True)).eval()
    leave_behind(tmp_path / "run", base, policy, LORA, critic=True)
    trained = find(tmp_path / "run" / "checkpoints" / "step_1")
    assert load(trained)[0].causal_lm.dtype == torch.bfloat16
    assert write_merged(trained, tmp_path / "out", None, "5GB").allowed == 5e-2


@pytest.mark.parametrize("place", ["final", "checkpoints/step_1"])
def test_another_model_in_the_base_s_place_is_refused(place: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    leave_behind(tmp_path / "run", base, make_policy(base, LORA), LORA)
    trained = find(tmp_path / "run" / place)
    load(trained)
    other = AutoModelForCausalLM.from_pretrained(base.name)
    other.lm_head.weight.data += 1.0
    other.save_pretrained(base.name)
    with pytest.raises(ValueError, match="is not the base model of this training any more"):
        load(trained)


def test_another_base_is_refused(base: ModelConfig, tmp_path: Path) -> None:
    leave_behind(tmp_path / "run", base, make_policy(base, LORA), LORA)
    trained = find(tmp_path / "run" / "checkpoints" / "step_1")
    trained.config["model"]["name"] = "toy"
    with pytest.raises(ValueError, match="'toy' is not the base model"):
        load(trained)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_that_could_not_be_merged(target: str, base: ModelConfig) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", target])
    if target == "lm_head" and not load_model_config(base).tie_word_embeddings:
        policy = load_policy(base, lora, torch.float32, None)
        assert any(name.endswith(target) for name in adapted_layers(policy))
    else:
        with pytest.raises(ValueError, match=rf"lora\.target_modules: .*{target}"):
            load_policy(base, lora, torch.float32, None)


def test_files_that_differ_are_noticed(base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(base, None)
    state = {name: p.detach().clone() for name, p in policy.causal_lm.named_parameters()}
    monkeypatch.setattr("grpo_dist.model.export._tensors", lambda directory: [torch.zeros(3)])
    with pytest.raises(RuntimeError, match="files have 3 numbers"):
        write(policy.causal_lm, state, load_tokenizer(base), tmp_path)
    with pytest.raises(RuntimeError, match="not the trained one"):
        compare(torch.ones(3), torch.tensor([1.0, 1.0, 1.001]), "torch.float32")


def test_the_final_model_of_a_shorter_run_is_not_taken_for_the_longer_one_s(base: ModelConfig, tmp_path: Path) -> None:
    run, policy = tmp_path / "run", make_policy(base, LORA)
    leave_behind(run, base, policy, LORA)
    final, checkpoints = run / "final", run / "checkpoints"
    assert find(run).path == checkpoints / "step_1"  # half written, for all that is known
    assert (find(final).path, find(final).step) == (final, 1)
    write_record(final, 1, checkpoints)
    assert (find(run).path, find(run).step) == (final, 1)
    # the run goes on, and is killed when its last step is done, but nothing of it saved
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
    assert (find(run).path, find(run).step, find(final).step) == (final, 1, 1)
    meta = checkpoint.load_meta(checkpoints / "step_1")
    checkpoint.save(checkpoints, 2, {}, meta | {"step": 2}, keep=2)
    assert find(run).path == checkpoints / "step_2"
    assert (find(final).path, find(final).step) == (final, 1)
    shutil.rmtree(checkpoints)
    assert (find(run).path, find(run).step) == (final, 1)


def test_a_run_that_another_version_wrote(base: ModelConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    leave_behind(run, base, make_policy(base, LORA), LORA)
    trained = find(run / "final")
    trained.config["model"]["brand_new"] = 1
    with pytest.raises(ValueError, match=r"the options model\.brand_new, which this version"):
        load(trained)
    for text in ("", "a: [", "train: {}"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml lacks options"):
            find(run / "final")
