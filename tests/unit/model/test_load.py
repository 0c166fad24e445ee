"""Models: what is loaded, the reference, and what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_models import IDS, LORA, logits, make_base, make_moved, make_policy, make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CamembertConfig

from grpo_dist.checkpoint.reopening import check_final, divergence, rounding_kl
from grpo_dist.config.schema import LoraConfig, ModelConfig
from grpo_dist.model import attention
from grpo_dist.model.config_files import end_token_ids, load_model_config, load_tokenizer
from grpo_dist.model.export import choose_dtype, kept_shares, merged_state, save_final
from grpo_dist.model.files import UnfitModel
from grpo_dist.model.fixed_row import fixed_logits
from grpo_dist.model.load import adapted_layers, load_causal_lm, load_policy, trainable
from grpo_dist.model.packing import Pack, Piece, make_pack
from grpo_dist.model.policy import Policy, PolicyOptions
from grpo_dist.model.reference import AdaptersOff, FrozenCopy
from grpo_dist.model.rollout_weights import RolloutModel
from grpo_dist.types import Batch, Prompt


def make_copy(base: ModelConfig, dtype: torch.dtype = torch.float32, *, fuses_layers: bool = False) -> FrozenCopy:
    """The base in weights of its own."""
    return FrozenCopy(load_causal_lm(base, dtype, attention.NAME), 1.0, fuses_layers=fuses_layers)


def make_pack_of_two() -> Pack:
    """A prompt with two completions."""
    zeros = torch.zeros(2, dtype=torch.float64)
    batch = Batch([Prompt(0, [4, 8, 15], "")], torch.tensor([0, 0]), torch.tensor([3, 2]), zeros > 0, IDS[:5],
                  IDS[:5] >= 0, torch.zeros(5), zeros[:, None], zeros)  # fmt: skip
    return make_pack(batch, [Piece(0, [0, 1])])


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """The model holds exactly what it state."""
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_the_first_step_has_no_kl(lora: LoraConfig | None, base: ModelConfig) -> None:
    """Promise 4: before training, the policy's log-probabilities are the reference's."""
    policy, pack = load_policy(base, lora, torch.float32, attention.NAME), make_pack_of_two()
    assert torch.equal(make_copy(base).logprobs(pack), policy(pack)[0].detach())
    assert not torch.equal(make_copy(base).logprobs(pack), make_policy(base, lora)(pack)[0].detach())


def test_the_first_step_has_no_kl_with_layers_in_one_operation(base: ModelConfig) -> None:
    options, pack = PolicyOptions(fuses_layers=True), make_pack_of_two()
    policy = load_policy(base, LORA, torch.float32, attention.NAME, options)
    logprobs = policy(pack)[0].detach()
    assert torch.equal(make_copy(base, fuses_layers=True).logprobs(pack), logprobs)
    assert torch.equal(AdaptersOff(policy, policy).logprobs(pack), logprobs)


def test_the_same_seed_draws_the_same_adapters(base: ModelConfig) -> None:
    one, same, other = (load_policy(base, LORA, torch.float32, attention.NAME, seed=seed) for seed in (3, 3, 4))
    assert trainable(one).keys() == trainable(same).keys()
    assert all(".lora_" in name for name in trainable(one))
    assert all(torch.equal(p, trainable(same)[name]) for name, p in trainable(one).items())
    assert any(not torch.equal(p, trainable(other)[name]) for name, p in trainable(one).items())


def test_full_fine_tuning_trains_everything_in_float32(base: ModelConfig) -> None:
    policy = load_policy(base, None, torch.bfloat16, attention.NAME)
    assert len(trainable(policy)) == len(list(policy.parameters()))
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_the_policy_as_its_own_reference(base: ModelConfig) -> None:
    policy, pack = make_policy(base, LORA), make_pack_of_two()
    before, moved = weights(policy), policy(pack)[0].detach()
    assert torch.equal(AdaptersOff(policy, policy).logprobs(pack), make_copy(base).logprobs(pack))
    assert torch.equal(policy(pack)[0].detach(), moved)
    assert_same_bits(policy, before)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_what_is_exported_is_what_was_trained(lora: LoraConfig | None, base: ModelConfig, tmp_path: Path) -> None:
    policy, tokenizer, pack = make_policy(base, lora), load_tokenizer(base), make_pack_of_two()
    before, scored, target = weights(policy), policy(pack)[0].detach(), logits(policy.causal_lm)
    save_final(policy, tokenizer, tmp_path / "final", is_main=True)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert torch.allclose(logits(final, shared=False), target, atol=1e-5)
    assert set(final.generation_config.eos_token_id) == {256, 7, 9}
    text = "What is 2 + 3?"
    assert AutoTokenizer.from_pretrained(tmp_path / "final").encode(text) == tokenizer.encode(text)
    assert "grpo_dist" not in (tmp_path / "final" / "config.json").read_text()
    if lora is not None:
        plain = AutoModelForCausalLM.from_pretrained(base.name)
        adapted = PeftModel.from_pretrained(plain, tmp_path / "final" / "adapter").eval()
        assert torch.allclose(logits(adapted, shared=False), target, atol=1e-5)
        written = json.loads((tmp_path / "final" / "adapter" / "adapter_config.json").read_text())["target_modules"]
        assert len(written) >= 7 and written == sorted(written), "equal runs write equal files"
    # and the policy is as it was: exporting in the middle of a run changes nothing
    assert_same_bits(policy, before)
    assert torch.equal(policy(pack)[0].detach(), scored)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_tied_head_that_comes_before_the_embeddings_is_written(lora: LoraConfig | None, tmp_path: Path) -> None:
    """CamemBERT's code makes the head first, so that the tensor's first name is the head's."""
    config = CamembertConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1, is_decoder=True,
                             num_attention_heads=4, max_position_embeddings=64, bos_token_id=None)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = load_policy(ModelConfig(name=str(tmp_path)), lora, torch.float32, "sdpa").eval()
    trainable(policy)[list(trainable(policy))[-1]].data.add_(0.1)
    save_final(policy, make_tokenizer(), tmp_path / "final", is_main=True)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert torch.allclose(final(IDS[None]).logits, policy.causal_lm(IDS[None]).logits, atol=1e-5)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_head_of_its_own_is_kept_although_its_config_says_tied(lora: LoraConfig | None, tmp_path: Path) -> None:
    """transformers ties no head whose weights in the file are not the embeddings'."""
    base = make_base(tmp_path, tied=False)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    target = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), shared=False)
    policy = load_policy(base, lora, torch.float32, attention.NAME).eval()
    assert torch.allclose(logits(policy.causal_lm), target, atol=1e-5)
    with RolloutModel(policy, torch.float32, attention.NAME).open() as model:
        assert torch.allclose(logits(model), target, atol=1e-5)
    save_final(policy, make_tokenizer(), tmp_path / "final", is_main=True)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert torch.allclose(logits(final, shared=False), target, atol=1e-5)


def test_other_ranks_export_nothing(base: ModelConfig, tmp_path: Path) -> None:
    save_final(make_policy(base, LORA), load_tokenizer(base), tmp_path / "final", is_main=False)
    assert not (tmp_path / "final").exists()


def test_a_bfloat16_policy_is_merged_in_float32(base: ModelConfig, tmp_path: Path) -> None:
    policy = load_policy(base, LORA, torch.bfloat16, attention.NAME).eval()
    torch.manual_seed(1)
    for parameter in trainable(policy).values():
        parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    save_final(policy, load_tokenizer(base), tmp_path / "final", is_main=True)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert final.dtype == torch.bfloat16
    for name, layer in adapted_layers(policy).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.dtype == b.dtype == torch.float32
        merged = layer.get_base_layer().weight.float() + (b @ a) * layer.scaling["default"]
        assert torch.equal(final.get_parameter(f"{name}.weight"), merged.bfloat16()), name
    assert float((logits(final, shared=False).float() - logits(policy.causal_lm).float()).abs().max()) < 0.3


@pytest.mark.parametrize("moved", [1e-6, 1e-5])
def test_a_small_update_is_written_in_float32(moved: float, base: ModelConfig, tmp_path: Path) -> None:
    policy = make_moved(base, torch.bfloat16, 0.0)
    assert kept_shares(policy, [torch.bfloat16, torch.float32], True) == [None, None], "nothing has been learned"
    assert choose_dtype(policy, True) == (torch.bfloat16, "weights in bfloat16")
    policy = make_moved(base, torch.bfloat16, moved)
    rounded, exact = kept_shares(policy, [torch.bfloat16, torch.float32], True)
    assert rounded < 0.5 and 0.99 <= exact <= 1
    assert kept_shares(policy, [torch.bfloat16], False) == [None], "another rank's"
    line = f"which keep {exact:.1%} of what the adapters have learned (bfloat16: {rounded:.1%})"
    assert choose_dtype(policy, True) == (torch.float32, f"weights in float32, {line}")
    line = f"which keep {rounded:.1%} of what the adapters have learned (float32: {exact:.1%})"
    assert choose_dtype(policy, True, torch.bfloat16) == (torch.bfloat16, f"weights in bfloat16, {line}")
    save_final(policy, load_tokenizer(base), tmp_path / "final", is_main=True)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert final.dtype == torch.float32
    assert divergence(fixed_logits(policy.causal_lm), fixed_logits(final)) < rounding_kl(torch.bfloat16)


def test_a_large_update_is_written_in_the_policys_dtype(base: ModelConfig) -> None:
    chosen, line = choose_dtype(make_moved(base, torch.bfloat16, 0.1), True)
    assert chosen == torch.bfloat16 and "float32" not in line


def test_what_rounding_adds_is_not_kept(base: ModelConfig) -> None:
    """Every weight moves by 0.6 of a unit in its last place, and rounding makes a whole unit of it."""
    policy = make_moved(base, torch.bfloat16, 0.0)
    for layer in adapted_layers(policy).values():
        layer.get_base_layer().weight.data.fill_(1.0)
        layer.lora_A["default"].weight.data.fill_(1.0)
        layer.lora_B["default"].weight.data.fill_(0.6 * torch.finfo(torch.bfloat16).eps / LORA.alpha)
    (share,) = kept_shares(policy, [torch.bfloat16], True)
    assert share == pytest.approx(1 - (0.4 / 0.6) ** 2, abs=1e-4)
    assert choose_dtype(policy, True)[0] == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_model_keeps_in_float32_is_written_so(dtype: torch.dtype, base: ModelConfig) -> None:
    policy = make_moved(base, torch.bfloat16, 0.1)
    norm = policy.causal_lm.model.norm
    norm.weight.data = norm.weight.data.float() + 1e-5
    state = merged_state(policy, True, dtype)
    assert torch.equal(state.pop("model.norm.weight"), norm.weight)
    assert {tensor.dtype for tensor in state.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_that_is_written_is_compared_with_the_policy(
    dtype: torch.dtype, base: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "grpo_dist.checkpoint.reopening")
    policy = make_moved(base, dtype, 0.1)
    save_final(policy, load_tokenizer(base), tmp_path / "final", is_main=True)
    check_final(tmp_path / "final", fixed_logits(policy.causal_lm), dtype, trust_remote_code=False)
    check_final(tmp_path / "final", fixed_logits(load_causal_lm(base, dtype, None)), dtype, trust_remote_code=False)
    (tmp_path / "final" / "model.safetensors").write_bytes(b"damaged")
    check_final(tmp_path / "final", fixed_logits(policy.causal_lm), dtype, trust_remote_code=False)
    said = [line for line in caplog.records if line.name == "grpo_dist.checkpoint.reopening"]
    assert [(line.levelname, line.message.split(": ")[1].split(",")[0]) for line in said[:2]] == [
        ("INFO", "reopened"), ("WARNING", "reopened"),
    ]  # fmt: skip
    assert said[2].levelname == "WARNING" and "cannot be opened" in said[2].message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, base: ModelConfig, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.name)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.name: .*not finite.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(ModelConfig(name=str(tmp_path)), torch.float32, attention.NAME)


def test_a_config_that_asks_for_more_output_changes_nothing(base: ModelConfig, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(base.name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    more = {"output_attentions": True, "output_hidden_states": True, "return_dict": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    asked = ModelConfig(name=str(tmp_path))
    loaded, plain = (load_causal_lm(each, torch.float32, attention.NAME) for each in (asked, base))
    assert torch.equal(fixed_logits(loaded), fixed_logits(plain))
    assert not load_model_config(asked).output_attentions


@pytest.mark.parametrize("load", [load_model_config, load_tokenizer])
def test_code_that_comes_with_a_model_is_asked_for_by_the_option(load: Any, tmp_path: Path) -> None:
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UnfitModel, match=r"model\.name: .* set model\.trust_remote_code: true"):
        load(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize("attn_implementation", [None, "eager", attention.NAME])
def test_an_attention_in_config_json_is_not_that_of_the_run(
    attn_implementation: str | None, base: ModelConfig, tmp_path: Path
) -> None:
    """Releases of transformers wrote it there, and it may need a package that is not installed."""
    AutoModelForCausalLM.from_pretrained(base.name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_attn_implementation": "flash_attention_2"}))
    loaded: Any = load_causal_lm(ModelConfig(name=str(tmp_path)), torch.float32, attn_implementation)
    assert loaded.config._attn_implementation == (attn_implementation or "sdpa")


def test_log_probabilities_are_at_the_temperature(base: ModelConfig) -> None:
    pack = make_pack_of_two()
    policy = Policy(load_causal_lm(base, torch.float32, attention.NAME), PolicyOptions(temperature=0.5))
    model = load_causal_lm(base, torch.float32, "sdpa")
    expected = []
    for completion in (IDS[:3], IDS[3:5]):
        row = torch.cat([torch.tensor([4, 8, 15]), completion])[None]
        rows = torch.log_softmax(model(input_ids=row).logits[0, 2:-1] / 0.5, -1)
        expected.append(rows.gather(-1, completion[:, None])[:, 0])
    assert torch.allclose(policy(pack)[0], torch.cat(expected), atol=1e-5)


def test_end_tokens_come_from_everywhere(base: ModelConfig, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    assert end_token_ids(base, tokenizer) == [7, 9, 250, 256]
    for file in Path(base.name).iterdir():  # many repositories have no generation_config.json
        if file.name != "generation_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert end_token_ids(ModelConfig(name=str(tmp_path)), tokenizer) == [250, 256]


def test_end_tokens_that_are_none_are_named(
    base: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in Path(base.name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 7, 257]}))
    model = ModelConfig(name=str(tmp_path))
    assert end_token_ids(model, load_tokenizer(model)) == [7, 250, 256]
    assert "has -1, 257, expected tokens of the model (0 to 256)" in caplog.text


def test_a_generation_config_that_transformers_would_not_save_is_exported(base: ModelConfig, tmp_path: Path) -> None:
    """Published models have a temperature beside do_sample: false; a run would fail at its end, and each time anew."""
    for file in Path(base.name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    given = {"eos_token_id": [7, 9], "do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    model = ModelConfig(name=str(tmp_path))
    policy = make_policy(model, LORA)
    policy.causal_lm.generation_config._original_object_hash = None  # with it newer releases know files of others
    save_final(policy, load_tokenizer(model), tmp_path / "final", is_main=True)
    written = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert {name: written.get(name) for name in given} == given


@pytest.mark.parametrize("text", ['{"eos_token_id": 7', '{"num_beams": 2, "num_return_sequences": 5}'])
def test_a_generation_config_that_cannot_be_read_is_named(text: str, base: ModelConfig, tmp_path: Path) -> None:
    """It would not be missing: its end tokens would."""
    for file in Path(base.name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.name: generation_config\.json of '.*' cannot be read"):
        end_token_ids(ModelConfig(name=str(tmp_path)), load_tokenizer(base))


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    tokenizer = load_tokenizer(ModelConfig(name=str(tmp_path)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    settings: dict[str, Any] = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"model\.name.*end-of-sequence"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))
