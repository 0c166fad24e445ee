"""Runs that go on from a PEFT adapter: its shape, its values, the reference, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import make_tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config

from grpo_dist.config.schema import Config, LoraConfig, ModelConfig, ReferenceConfig
from grpo_dist.model.adapter import require_own_values, with_adapter
from grpo_dist.model.adapter_values import fingerprint, load_adapter
from grpo_dist.model.config_files import load_tokenizer
from grpo_dist.model.files import UnfitModel
from grpo_dist.model.load import load_policy
from grpo_dist.model.reference import AdaptersAtStart, AdaptersOff
from grpo_dist.model.toy import toy_path

ROW = torch.tensor([[5, 9, 33, 60, 7, 12]])


@pytest.fixture(scope="module", name="base")
def _base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A small random model on the disk."""
    path = tmp_path_factory.mktemp("base")
    config = Qwen2Config(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=256,
                         initializer_range=0.2)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return ModelConfig(name=str(path), dtype="float32")


def make_adapter(path: Path, model: ModelConfig, **options: Any) -> Path:
    """An adapter that adds something, with its base by name."""
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(model.name, dtype="float32")
    given = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False} | options
    get_peft_model(plain, PeftLoraConfig(task_type="CAUSAL_LM", **given)).save_pretrained(path)
    return path


def config_of(name: Path | str, **options: Any) -> Config:
    return Config(model=ModelConfig(name=str(name), dtype="float32"), **options)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_policy_begins_as_the_adapter(base: ModelConfig, tmp_path: Path, use_rslora: bool) -> None:
    place = make_adapter(tmp_path / "adapter", base, use_rslora=use_rslora)
    config = with_adapter(config_of(place, lora=LoraConfig(dropout=0.1)))
    assert config.model.name == base.name and config.lora is not None and config.model.tokenizer is None
    shape = config.lora
    assert (shape.r, shape.alpha, shape.dropout, shape.use_rslora) == (4, 12, 0.1, use_rslora)
    assert shape.init_from == str(place) and set(shape.target_modules) == {"q_proj", "up_proj"}
    assert with_adapter(replace(config_of(base.name), lora=LoraConfig(init_from=str(place)))).lora == replace(
        shape, dropout=0.0
    )
    policy = load_policy(config.model, shape, torch.float32, None).eval()
    plain = AutoModelForCausalLM.from_pretrained(base.name, dtype="float32")
    expected = PeftModel.from_pretrained(plain, str(place)).eval()
    with torch.no_grad():
        got, theirs = policy.causal_lm(ROW).logits, expected(ROW).logits
        without = policy.model.disable_adapter
        torch.testing.assert_close(got, theirs, atol=1e-5, rtol=1e-5)
        with without():
            assert float((policy.causal_lm(ROW).logits - got).abs().max()) > 0.01


@pytest.mark.parametrize(("named", "given", "is_other"), [
    ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", True), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", False),
    ("/models/Qwen2.5-0.5B/", "Qwen/Qwen2.5-0.5B", False), (None, "Qwen/Qwen2.5-0.5B", False),
    ("/cache/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b", "Qwen/Qwen2.5-0.5B", False),
    (str(toy_path("toy")), "toy", False), (str(toy_path("toy")), "toy-carry", True),
])  # fmt: skip
def test_another_base_of_the_same_shapes_is_named(
    named: str | None, given: str, is_other: bool, base: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing else shows that an adapter was not trained on it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = make_adapter(tmp_path / "adapter", base)
    entries = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(entries | {"base_model_name_or_path": named}))
    monkeypatch.setattr("grpo_dist.model.hub.adapter_config", lambda option, name, revision:
                        Path(name, "adapter_config.json") if Path(name).is_dir() else None)  # fmt: skip
    with_adapter(config_of(given, lora=LoraConfig(init_from=str(place))))
    ours = [record for record in caplog.records if record.name == "grpo_dist.model.adapter"]
    warned = [record.getMessage() for record in ours if record.levelname == "WARNING"]
    assert len(warned) == is_other and all(f"names {named!r} as its base" in line for line in warned)


def test_the_tokenizer_beside_an_adapter(base: ModelConfig, tmp_path: Path) -> None:
    place, tokenizer = make_adapter(tmp_path / "adapter", base), load_tokenizer(base)
    tokenizer.chat_template = "mine"
    tokenizer.save_pretrained(place)
    model = with_adapter(config_of(place)).model
    assert model.tokenizer == str(place) and load_tokenizer(model).chat_template == "mine"
    with pytest.raises(ValueError, match=r"model\.tokenizer: .* no tokenizer_config\.json"):
        load_tokenizer(replace(model, tokenizer=str(tmp_path)))


def test_a_base_beside_the_adapter(base: ModelConfig, tmp_path: Path) -> None:
    place = make_adapter(tmp_path / "adapter", base)
    (tmp_path / "its-base").symlink_to(base.name)
    entries = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(entries | {"base_model_name_or_path": "its-base"}))
    assert with_adapter(config_of(place)).model.name == str(tmp_path / "its-base")


def test_the_reference_is_the_adapter_or_the_base(base: ModelConfig, tmp_path: Path) -> None:
    config = with_adapter(config_of(make_adapter(tmp_path / "adapter", base), lora=LoraConfig(dropout=0.2)))
    policy = load_policy(config.model, config.lora, torch.float32, None)
    policy.train()

    def scores(row: Any) -> tuple[torch.Tensor]:
        return (policy.causal_lm(row).logits,)

    references = {"adapter": AdaptersAtStart(scores, policy), "base": AdaptersOff(scores, policy)}
    pack: Any = ROW
    policy.eval()
    with torch.no_grad():
        (start,) = scores(ROW)
    policy.train()
    assert torch.equal(references["adapter"].logprobs(pack), start)
    assert not torch.allclose(references["base"].logprobs(pack), start, atol=1e-3)
    adapters = [p for p in policy.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in adapters:
            parameter.add_(0.1)
    before = [parameter.clone() for parameter in adapters]
    assert torch.equal(references["adapter"].logprobs(pack), start)
    assert all(map(torch.equal, before, adapters)) and policy.training


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"), "bias": ({"bias": "all"}, "bias"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pattern": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_more_than_low_rank_matrices_is_refused(name: str, base: ModelConfig, tmp_path: Path) -> None:
    options, key = REFUSED[name]
    with pytest.raises(UnfitModel, match=rf"model\.name: .*{key}.* merge"):
        with_adapter(config_of(make_adapter(tmp_path / "adapter", base, **options)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [({"peft_type": "IA3"}, "type IA3"), ({"init_lora_weights": "pissa"}, "changes the weights of the base"),
     ({"of_tomorrow": 3}, "of_tomorrow"), ({"base_model_name_or_path": None}, "names no base model")],
)  # fmt: skip
def test_other_adapters_are_refused(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    known = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "x", "loftq_config": {}, "lora_bias": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(known | entries))
    with pytest.raises(UnfitModel, match=message):
        with_adapter(config_of(tmp_path))


def test_options_that_contradict_the_adapter(base: ModelConfig, tmp_path: Path) -> None:
    place = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(UnfitModel, match=r"lora\.r: 8 given, expected 4"):
        with_adapter(config_of(place, lora=LoraConfig(r=8)))
    with pytest.raises(UnfitModel, match="lora: null given"):
        with_adapter(config_of(place, lora=None))
    with pytest.raises(UnfitModel, match=r"lora\.init_from: .* expected a PEFT adapter"):
        with_adapter(config_of(base.name, lora=LoraConfig(init_from=base.name)))
    own = with_adapter(config_of(place, reference=ReferenceConfig(placement="shared")))
    own.loss.kl_coeff = 0.1
    require_own_values(own, False)
    with pytest.raises(UnfitModel, match=r"reference\.placement: 'shared'"):
        require_own_values(own, True)


def test_an_adapter_of_another_base(base: ModelConfig, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {"adapter": {}, "other": {"target_modules": ["q_proj"]}, "wide": {"r": 5}}
    places = [make_adapter(tmp_path / name, base, **options) for name, options in kinds.items()]
    config = with_adapter(config_of(places[0]))
    policy = load_policy(config.model, config.lora, torch.float32, None)
    with pytest.raises(UnfitModel, match="it lacks"):
        load_adapter(policy.model, str(places[1]))
    with pytest.raises(UnfitModel, match="another base model"):
        load_adapter(policy.model, str(places[2]))
    assert len({fingerprint(str(place)) for place in places}) == 3
    values = load_file(places[0] / "adapter_model.safetensors")
    name = min(values)
    values[name][0, 1] = torch.nan
    save_file(values, places[0] / "adapter_model.safetensors")
    with pytest.raises(UnfitModel, match=f"has values that are not finite in {re.escape(name)}"):
        load_adapter(policy.model, str(places[0]))


def test_a_hub_that_does_not_answer_ends_the_program_at_the_first_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model").mkdir()
    failures: list[Exception] = [HFValidationError("no such id")]

    def download(*_: Any, **__: Any) -> str:
        raise failures[0]

    monkeypatch.setattr("grpo_dist.model.hub.hf_hub_download", download)
    monkeypatch.setattr("grpo_dist.model.hub.is_offline_mode", lambda: False)
    assert with_adapter(config_of("no_such_model")).model.name == "no_such_model", "who loads the model reports it"
    failures[0] = LocalEntryNotFoundError("not in the cache")
    failures[0].__cause__ = ConnectionError("name or service not known")
    with pytest.raises(OSError, match=r"model\.name: 'my_mdoel' is no directory in .*; near it: my_model, and the hub "
                       "does not answer: name or service not known"):  # fmt: skip
        with_adapter(config_of("my_mdoel"))
    monkeypatch.setattr("grpo_dist.model.hub.is_offline_mode", lambda: True)
    assert with_adapter(config_of("my_mdoel")).model.name == "my_mdoel", "nobody was asked"
