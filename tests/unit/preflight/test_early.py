"""What is said against a run before torch is imported: by the launch, and by the files of a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_configs import tiny_config
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from grpo_dist.config.algorithm import LossConfig
from grpo_dist.config.places import require_writable
from grpo_dist.config.schema import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    ReferenceConfig,
    RolloutConfig,
    TrainConfig,
)
from grpo_dist.config.vllm import VllmConfig
from grpo_dist.model import names
from grpo_dist.model.names import require_known_names
from grpo_dist.model.token_names import require_known_tokens
from grpo_dist.model.toy import toy_path
from grpo_dist.preflight.early import refuse_mistakes, require_possible

ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
Change = Callable[[Path], None]


def entries(**changes: Any) -> Change:
    """Changes of a model's config.json."""

    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def adapter(**given: Any) -> Change:
    """An adapter in the place of the model."""
    return lambda path: (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | given)) and None


def cut_off(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])


def other_base(path: Path) -> None:
    """An adapter of the toy model with a matrix of another width in the place of the model."""
    adapter(r=4, base_model_name_or_path=str(toy_path()))(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 100)}, path / "adapter_model.safetensors")


SHORT = {"rollout": RolloutConfig(max_completion_length=16), "data": DataConfig(max_prompt_length=64)}
REFUSED: dict[str, tuple[Change, dict[str, Any], Mapping[str, str], str]] = {
    # name: (what is wrong with the model's directory, options, variables of the launch, message)
    "no directory": (shutil.rmtree, {}, {}, "there is no directory"),
    "gptq": (entries(quantization_config={"quant_method": "gptq"}), {}, {}, r"a quantised checkpoint \(gptq\)"),
    "type": (entries(model_type="rwkv"), {}, {}, "of the type rwkv given, which cannot be trained here"),
    "head": (entries(architectures=["LlamaForSequenceClassification"]), {}, {}, "no head that predicts tokens"),
    "encoder": (entries(is_encoder_decoder=True), {}, {}, "an encoder-decoder"),
    "positions": (entries(max_position_embeddings=64), {}, {}, r"768 tokens given, the model has 64 positions"),
    "of MPT": (entries(max_position_embeddings=None, max_seq_len=64), {}, {}, r"64 positions \(max_seq_len\)"),
    "embeddings": (entries(use_bidirectional_attention=True), {}, {}, "a model given whose tokens see later ones"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), {}, {}, "has no weights"),
    "cut off": (cut_off, {}, {}, "is not a complete weight file"),
    "said quantised": (entries(quantization_config=NF4), {}, {}, "its weights are not quantised"),
    "quantised twice": (entries(quantization_config=NF4), {"model": {"quantization": "int8"}}, {},
                        "is quantised already, in nf4"),
    "all weights": (entries(quantization_config=NF4), {"lora": None}, {}, "lora: null given with a checkpoint in nf4"),
    "quantised under zero3": (entries(), {"model": {"quantization": "nf4"}}, ZERO3, "ZeRO-3 or FSDP2, which would"),
    "quantised under fsdp2": (entries(quantization_config=NF4), {}, FSDP2, "ZeRO-3 or FSDP2, which would shard it"),
    "layer": (entries(), {"lora": LoraConfig(target_modules=["q_proj", "v_prj"])}, {},
              r"'v_prj' is not a layer of Qwen2ForCausalLM; did you mean 'v_proj'\? Expected .* among down_"),
    "pattern": (entries(), {"lora": LoraConfig(target_modules="q_proj")}, {}, r"matches none; write \[q_proj\]"),
    "experts": (entries(), {"lora": LoraConfig(target_parameters=["experts.up_prj"])}, {},
                "'experts.up_prj' given, which is no parameter of it"),
    "unknown type": (entries(model_type="qwen22"), {}, {}, r"type qwen22 .* does not know.*; did you mean 'qwen2'\?"),
    "no language model": (entries(model_type="vit"), {}, {}, "type vit given, expected a causal language model"),
    "two tokens": (entries(), {"rollout": RolloutConfig(banned_tokens=["hello"])}, {},
                   r"a text of one token: the tokenizer makes \['h', 'e"),
    "no token": (entries(), {"rollout": RolloutConfig(banned_tokens=[324])}, {}, "324 given, expected an id .* to 323"),
    "the end of all": (entries(), {"rollout": RolloutConfig(banned_tokens=["<|endoftext|>"])}, {},
                       r"rollout\.banned_tokens: \['<\|endoftext\|>'\] given, expected a token that may end"),
    "stop at the end": (entries(), {"rollout": RolloutConfig(stop=["<|endoftext|>"])}, {},
                        r"rollout\.stop: '<\|endoftext\|>' given, expected a text that occurs .* makes \['a', '<\|end"),
    "no experts": (entries(), {"rollout": RolloutConfig(routing_replay=True)}, {},
                   r"routing_replay: True given, expected auto or false for a model without experts \(qwen2\)"),
    "long rows": (entries(rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": 512}), {}, {},
                  r"768 tokens given, expected at most 512 for this model: .* \(longrope\)"),
    "fp8": (entries(quantization_config={"quant_method": "fp8", "weight_block_size": None}), {}, {},
            r"a quantised checkpoint \(fp8\)"),
    "adapter of another": (other_base, SHORT, {}, r"lora\.init_from: .*lora_A\.weight of the shape \[4, 100\], "
                                                  r"expected \[4, 128\]: it belongs to another"),
    "adapter under zero3": (other_base, {**SHORT, "reference": ReferenceConfig(placement="shared"),
                                         "loss": LossConfig(kl_coeff=0.1)}, ZERO3,
                            "reference.placement: 'shared' given, expected `copy` under ZeRO-3"),
    "dora": (adapter(use_dora=True), {}, {}, "is an adapter with use_dora: true"),
    "ia3": (adapter(peft_type="IA3"), {}, {}, "a PEFT adapter of the type IA3"),
    "lora null": (adapter(r=4), {"lora": None}, {}, "is a PEFT adapter. To train all weights"),
    "no adapter": (entries(), {"lora": LoraConfig(init_from="MODEL")}, {}, "expected a PEFT adapter"),
    "ranks": (entries(), {"train": TrainConfig(sequence_parallel_size=2)}, {"WORLD_SIZE": "3"}, "the number of ranks"),
    "layers": (entries(layer_types=["linear_attention"]), {"train": TrainConfig(sequence_parallel_size=2)},
               {"WORLD_SIZE": "2"}, "cannot be divided among ranks: layers of the kinds linear_attention"),
    "heads": (entries(num_attention_heads=3), {"train": TrainConfig(sequence_parallel_size=2)}, {"WORLD_SIZE": "2"},
              "a divisor of the 3 attention heads"),
    "no data": (entries(), {"data": DataConfig(train_file="trian.csv")}, {}, "no file 'trian.csv' in "),
    "no data of a mixture": (entries(), {"data": DataConfig(train_file={"configs/data/math_task_train.jsonl": 1})}, {},
                             r"near it: configs/data/math_tasks_train\.jsonl"),
    "nothing to evaluate on": (entries(), {"data": DataConfig(eval_file="no/eval.jsonl")}, {}, "no directory 'no'"),
    "no python": (entries(), {"rollout": RolloutConfig(engine="vllm", vllm=VllmConfig(python="/no/python"))}, {},
                  "rollout.vllm.python: '/no/python' given, which is no program here: launch/setup_vllm.sh"),
    "no place to write": (entries(), {"train": TrainConfig(output_dir="/proc/run")}, {},
                          r"train\.output_dir: /proc/run given, but /proc cannot be written to"),
    "fsdp1": (entries(), {}, {"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1 given"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_be_is_refused_before_torch_is_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_dist.model.files.require_package", lambda: None)
    change, options, environment, message = REFUSED[name]
    shutil.copytree(toy_path(), tmp_path / "model")
    entries(max_position_embeddings=1024)(tmp_path / "model")
    change(tmp_path / "model")
    given = {**options, "model": ModelConfig(name=str(tmp_path / "model"), **options.get("model", {}))}
    if isinstance(lora := given.get("lora"), LoraConfig) and lora.init_from:
        given["lora"] = LoraConfig(init_from=str(tmp_path / "model"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        require_possible(Config(**given), environment, int(environment.get("WORLD_SIZE", "1")))


def test_what_fits_or_is_not_here_is_not_refused(tmp_path: Path) -> None:
    """A model that fits, the toy, and repositories of the hub, which are left to those who load them."""
    shutil.copytree(toy_path(), tmp_path / "model")
    short = RolloutConfig(max_completion_length=16)
    for name in (str(tmp_path / "model"), "toy", "some/model"):
        config = Config(model=ModelConfig(name=name), rollout=short)
        config.data.max_prompt_length = 64
        require_possible(config, ZERO3, 2)
        config.data.max_prompt_length = 4096
        if name == "some/model":
            require_possible(config, ZERO3, 2)
        else:
            with pytest.raises(
                ValueError, match=r"data\.max_prompt_length .* 4112 tokens given, the model has \d+ pos"
            ):
                require_possible(config, ZERO3, 2)


def test_a_link_that_leads_nowhere_is_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match=r"/runs/one given, but .*/runs is a link to .*/disk, which does not"):
        require_writable(tmp_path / "runs" / "one")
    with pytest.raises(ValueError, match=r"\$\{HOME\} stands for itself in a config: write the path out"):
        require_writable(tmp_path / "${HOME}" / "one")
    (tmp_path / "disk").mkdir()
    require_writable(tmp_path / "runs" / "one")
    with pytest.raises(
        ValueError, match=r"train\.output_dir: .* a name that is not UTF-8 for Python.* LC_ALL=C\.UTF-8"
    ):
        require_writable(tmp_path / os.fsdecode(b"M\xfcller"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out: .*/file/one given, but .*/file cannot be written to \(Not a dir"):
        require_writable(tmp_path / "file" / "one", "--out")


def test_what_a_tokenizer_s_file_says_of_its_training(tmp_path: Path) -> None:
    """Its truncation and padding are not of texts that are looked up."""
    shutil.copytree(toy_path(), tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    rollout = RolloutConfig(max_completion_length=16, stop=["1234567"], banned_tokens=[" "])
    require_known_tokens(rollout, tmp_path / "model", tmp_path / "model")
    with pytest.raises(ValueError, match=r"makes \['a', '1', '2', '3', '4', '<\|endoftext\|>'\] of"):
        rollout.stop = ["1234<|endoftext|>"]
        require_known_tokens(rollout, tmp_path / "model", tmp_path / "model")


def test_the_toy_models_are_looked_into_too(tmp_path: Path) -> None:
    config = Config(lora=LoraConfig(target_modules=["q_prj"]), rollout=RolloutConfig(max_completion_length=16),
                    train=TrainConfig(output_dir=str(tmp_path / "run")))  # fmt: skip
    config.data.max_prompt_length = 64
    with pytest.raises(ValueError, match="'q_prj' is not a layer of Qwen2ForCausalLM; did you mean 'q_proj'"):
        require_possible(config, {}, None)


def test_a_release_that_drops_weights_under_zero3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.0 does; the two lines are of that release."""
    shutil.copytree(toy_path(), tmp_path / "model")
    entries(model_type="qwen3_moe", num_experts=4)(tmp_path / "model")
    config = Config(model=ModelConfig(name=str(tmp_path / "model")), lora=None)
    require_possible(config, {}, 1)
    old = {"integrations/deepspeed.py": "mapping = seen.setdefault(renamed_key, WeightRenaming(original, renamed_key))",
           "conversion_mapping.py": '"qwen3_moe": "qwen2_moe"'}  # fmt: skip
    read = names._source
    monkeypatch.setattr(names, "_source", lambda name: old.get(name) or read(name))
    require_possible(config, FSDP2, 1)
    with pytest.raises(ValueError, match=r"of the type qwen3_moe given with ZeRO-3, .* install a newer release"):
        require_possible(config, ZERO3, 1)
    entries(model_type="qwen3")(tmp_path / "model")
    require_possible(config, ZERO3, 1)


def test_nodes_with_disks_of_their_own_are_left_to_the_meeting_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model.name", "./nowhere"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refuse_mistakes(words)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        refuse_mistakes(words)


def in_cache(hub: Path, name: str, change: Change) -> None:
    """The toy's files but for its weights as a repository in the hub's cache, as a download leaves it."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    shutil.copytree(toy_path(), repository / "snapshots" / "c0ffee", ignore=shutil.ignore_patterns("*.safetensors"))
    change(repository / "snapshots" / "c0ffee")


def test_nothing_heavy_is_imported_for_it(tmp_path: Path) -> None:
    """For files in a directory and in the hub's cache: one process refuses all, and has imported nothing at the end."""
    script = """
import json, sys
from grpo_dist.preflight.early import refuse_mistakes
for words in json.loads(sys.argv[1]):
    try:
        refuse_mistakes(words)
    except SystemExit as end:
        assert end.code == 2
print(*{"torch", "transformers", "peft", "accelerate", "deepspeed", "datasets"} & sys.modules.keys())
"""
    shutil.copytree(toy_path(), tmp_path / "model")
    adapter(use_dora=True, bias="none", megatron_core="megatron.core")(tmp_path / "model")
    expected = {f"--model.name={tmp_path / 'model'}": ["error: model.name: ", "use_dora"]}
    for method in ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "hqq", "torchao", "quanto", "aqlm", "new"):
        stored = {"quant_method": method, "activation_scheme": "static"}
        in_cache(tmp_path / "hub", f"me/{method}", entries(quantization_config=stored))
        expected[f"--model.name=me/{method}"] = [f"error: model.name: a quantised checkpoint ({method}) given",
                                                 f"`hf download me/{method}` brings it up to date"]  # fmt: skip
    in_cache(tmp_path / "hub", "me/ia3", adapter(peft_type="IA3"))
    expected["--model.name=me/ia3"] = ["error: model.name: 'me/ia3' is a PEFT adapter of the type IA3"]
    expected["--lora.init_from=me/ia3"] = ["error: lora.init_from: 'me/ia3' is a PEFT adapter of the type IA3"]
    in_cache(tmp_path / "hub", "me/plain", entries(max_position_embeddings=1024))
    expected["--model.name=me/plain --rollout.stop=[<|endoftext|>]"] = ["error: rollout.stop: '<|endoftext|>' given"]
    expected["--model.name=me/plain --lora.target_modules=[q_prj]"] = []  # without weights, nothing is known of layers
    expected["--model.name=me/nowhere"] = []
    done = subprocess.run([sys.executable, "-c", script, json.dumps([words.split() for words in expected])], text=True,
                          capture_output=True, env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")})  # fmt: skip
    assert done.returncode == 0 and done.stdout == "\n", done.stderr
    refused = [parts for parts in expected.values() if parts]
    for line, parts in zip(done.stderr.splitlines(), refused, strict=True):
        assert all(part in line for part in parts), line


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_no_name_of_a_real_layer_is_refused(kind: str, tmp_path: Path) -> None:
    """The layers and tensors of every type of transformers that a tiny config can be made of. The name of no layer is
    refused, where all of the code is in the folder of the type."""
    try:
        config = tiny_config(kind, {"vocab_size": 96, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ImportError, ValueError, AttributeError, TypeError, NotImplementedError, StopIteration) as error:
        pytest.skip(f"no tiny model: {error}")
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    save_file({name: torch.zeros(1) for name in model.state_dict()}, tmp_path / "model.safetensors")
    layers = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    tensors = [".".join(name.split(".")[-2:]) for name, each in model.named_parameters() if each.ndim == 3]
    for targets in (layers, [name.rpartition(".")[2] for name in layers]):
        lora = LoraConfig(target_modules=targets, target_parameters=tensors)
        entries = json.loads((tmp_path / "config.json").read_text())
        require_known_names(ModelConfig(name=str(tmp_path)), lora, RolloutConfig(), tmp_path, entries)
    code = (names._package() / "models" / kind.replace("-", "_")).glob("modeling_*.py")
    if any(code) and not config.sub_configs:
        with pytest.raises(ValueError, match="'no_such_layer' is not a layer of"):
            lora = LoraConfig(target_modules=["no_such_layer"])
            require_known_names(ModelConfig(name=str(tmp_path)), lora, RolloutConfig(), tmp_path, entries)
