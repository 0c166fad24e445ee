"""What a model's files alone say against its training.

Imports neither torch nor transformers, so that the answer comes at once.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..config.checks import require
from ..config.places import gguf_advice, model_place
from ..config.rollout import RolloutConfig
from ..config.schema import Config, ModelConfig
from .toy import MODELS, toy_path

_SHOWN_NAMES = 12

OTHER_HEADS = ("Classification", "ForQuestionAnswering", "ForMaskedLM", "ForMultipleChoice",
               "ForNextSentencePrediction", "RewardModel", "ForReward", "ForScore", "ForCTC", "Detection",
               "Segmentation")  # fmt: skip
"""Suffixes of `architectures` of checkpoints that are no language models. The weights of their head would be random, or
those of the embeddings."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files from which transformers loads weights. With the suffix `.index.json` they list such files."""
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights in a file, by their names there."""
PACKAGE = "bitsandbytes"
DEQUANTIZED = {"fp8": ".weight_scale_inv", "mxfp4": "_blocks"}
"""Forms of quantised checkpoints that transformers dequantises while it loads them, with the end of a name that tensors
of such a checkpoint have."""
LOADED_IN = ("load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit")
"""Keys by which bitsandbytes' quantization_config says how weights are stored."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The names that configs give to the number of experts."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""The names that configs give to the number of positions."""
UNFIT_TYPES = {
    **{kind: "a token sees later ones" for kind in ("cpmant", "xlnet")},
    **{
        kind: "nothing is kept from which a rollout can be decoded"
        for kind in ("blt", "openai-gpt", "recurrent_gemma", "reformer", "rwkv", "xlm")
    },
    **{
        kind: "it drafts tokens for another model, and needs that model's states"
        for kind in ("gemma4_assistant", "gemma4_unified_assistant")
    },
    "prophetnet": "positions are made up and cannot be given",
    "xmod": "the language has to be set in code",
}
"""Model types that transformers' code does not let train, with the reason. A loaded model would show it too late.
`docs/models.py` examines all types."""


class UnfitModel(ValueError):
    """The model cannot be trained with this config."""


def require_fit(
    kind: str, text_kind: str, architectures: Sequence[str], quantization: Mapping[str, Any] | None,
    is_encoder_decoder: bool, has_own_code: bool,
) -> None:  # fmt: skip
    """Raise UnfitModel for what entries of config.json say: the type of the model and of its language model, the class
    that was saved, the quantization_config, and whether the code comes with the model."""
    if quantization and not is_bitsandbytes(quantization) and dequantized_form(quantization) is None:
        raise UnfitModel(
            f"model.name: a quantised checkpoint ({quantization.get('quant_method', 'quantization_config')}) given, "
            "expected weights in float32, bfloat16 or float16, or quantised by bitsandbytes, or in FP8 by blocks or "
            "MXFP4, which are dequantised when they are loaded: name the checkpoint that it comes from (and set "
            "model.quantization), or write a dequantised copy and remove quantization_config from its config.json"
        )
    if (reason := UNFIT_TYPES.get(kind) or UNFIT_TYPES.get(text_kind)) and not has_own_code:
        raise UnfitModel(f"model.name: a model of the type {kind} given, which cannot be trained here: in "
                         f"transformers' code of it, {reason}")  # fmt: skip
    if wrong := next((name for name in architectures if name.endswith(OTHER_HEADS)), None):
        raise UnfitModel(f"model.name: a checkpoint of {wrong} given (architectures in its config.json), expected a "
                         "causal language model: its weights have no head that predicts tokens")  # fmt: skip
    if is_encoder_decoder:
        raise UnfitModel(f"model.name: an encoder-decoder of the type {kind} given (is_encoder_decoder in its "
                         "config.json), expected a causal language model; its encoder would be left out")  # fmt: skip


def require_positions(entry: Callable[[str], Any], longest: int) -> None:
    """Raise UnfitModel where the model has too few positions for `longest` tokens; `entry` gives those of the language
    model's config."""
    name, positions = next(((name, given) for name in POSITIONS if (given := entry(name)) is not None), ("", longest))
    if longest > positions:
        raise UnfitModel(f"data.max_prompt_length + rollout.max_completion_length: {longest} tokens given, the model "
                         f"has {positions} positions ({name}): lower one of the two")  # fmt: skip


def require_fixed_positions(entry: Callable[[str], Any], longest: int) -> None:
    """Raise UnfitModel where the position of a token depends on the length of its row, up to `longest` tokens; `entry`
    gives those of the language model's config."""
    given = entry("rope_parameters") or entry("rope_scaling") or {}
    # some types of models have parameters for each kind of layer
    ropes = [given, *(each for each in given.values() if isinstance(each, dict))]
    kinds = {rope.get("rope_type") or rope.get("type"): rope for rope in ropes}
    if (kind := next((each for each in ("dynamic", "longrope") if each in kinds), None)) is None:
        return
    rope = kinds[kind]
    bound = (rope.get("original_max_position_embeddings") or entry("original_max_position_embeddings")
             or entry("max_position_embeddings") or longest)  # fmt: skip
    if longest > bound:
        raise UnfitModel(f"data.max_prompt_length + rollout.max_completion_length: {longest} tokens given, expected at "
                         f"most {bound} for this model: beyond, its position encoding ({kind}) depends on "
                         "the length of the sequence, so that a token's probability would change after it was drawn"
                         )  # fmt: skip


def require_causal(entry: Callable[[str], Any]) -> None:
    """Raise UnfitModel where the language model's config, whose entries `entry` gives, lets a token see later ones."""
    for name, seeing in (("use_bidirectional_attention", (True, "all")), ("is_causal", (False,))):
        if (given := entry(name)) in seeing:
            raise UnfitModel(f"model.name: a model given whose tokens see later ones ({name}: {given} in its "
                             "config.json), expected a causal language model: it was made for embeddings, and cannot "
                             "continue a text")  # fmt: skip


def layers_obstacle(entry: Callable[[str], Any], longest: int) -> str | None:
    """The reason in the language model's config why packs with shared prompts of `longest` tokens do not fit its
    layers, or None."""
    kinds = set(entry("layer_types") or []) - {"full_attention", "sliding_attention"}
    if (window := entry("attention_window")) and window < longest:
        return f"attention in a window of {window} tokens, shorter than the longest sequence of {longest}"
    if kinds:
        return f"layers of the kinds {', '.join(sorted(kinds))}"
    return next((f"its option {option}" for option in ("attention_chunk_size", "use_mrope") if entry(option)), None)


def stored_file(place: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a model, in its directory or, for a hub id, in the hub's cache on this machine; None where it is not
    there. The hub is not asked."""
    if (path := Path(place)).is_dir():
        return path / name if (path / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(place, name, revision=revision)
    except ValueError:  # no hub id: the loading function reports it
        return None
    return Path(cached) if isinstance(cached, str) else None


def read_entries(path: Path, name: str = "config.json") -> dict[str, Any] | None:
    """A JSON file in a model's directory; None where it cannot be read, which those who load the model report."""
    try:
        entries = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entries if isinstance(entries, dict) else None


def require_fit_files(
    config: Config, path: Path, entries: dict[str, Any], num_ranks: int | None, shards_weights: bool
) -> None:
    """Raise ValueError where the entries of config.json or the weight files in the directory of the model say that this
    run cannot be."""
    text = {**entries, **(entries.get("text_config") or {})}
    given = next((given for each in (entries, text) for key in ("quantization_config", "compression_config")
                  if (given := each.get(key))), None)  # fmt: skip
    kind = entries.get("model_type") or ""
    require_fit(kind, text.get("model_type") or "", entries.get("architectures") or [], given,
                bool(entries.get("is_encoder_decoder")), bool(entries.get("auto_map")))  # fmt: skip
    longest = config.max_sequence_length
    require_positions(text.get, longest)
    require_fixed_positions(text.get, longest)
    require_causal(text.get)
    require_quantizable(config, given)
    require_unsharded(kind_of(config.model, given) is not None, shards_weights)
    require_divisors(config, num_ranks, text.get("num_attention_heads"), layers_obstacle(text.get, longest))
    require_weights(config.model.name, Path(model_path(config.model)), given)


def require_weights(name: str, path: Path, quantization: Mapping[str, Any] | None = None) -> None:
    """Raise UnfitModel if a directory lacks weights that its files list, has incomplete ones, or has quantised ones
    where its config does not say so (its quantization_config), or the other way round."""
    if not path.is_dir():  # a hub id
        return
    listed, parts = _listed_weights(path)
    if not parts:
        raise UnfitModel(f"model.name: {name!r} has no weights, expected {' or '.join(WEIGHTS)} beside config.json, "
                         f"or several files with their list ({WEIGHTS[0]}.index.json)"
                         f"{'. ' + advice if (advice := gguf_advice(path)) else ''}")  # fmt: skip
    if missing := [part for part in parts if not (path / part).is_file()]:
        raise UnfitModel(f"model.name: {name!r} lacks {len(missing)} of the {len(parts)} weight files that its "
                         f"{listed}.index.json names ({some_names(missing)}): copy these files too")  # fmt: skip
    is_marked, form = False, dequantized_form(quantization)
    marks = (".SCB", ".quant_state.") if form is None else (DEQUANTIZED[form],)
    for part in (part for part in parts if part.endswith(".safetensors")):
        try:
            with safe_open(path / part, "np") as file:  # reads the header, and compares the length
                every = list(file.keys())
                names = [name for name in every if name.endswith("weight")]
                dtypes = {name: file.get_slice(name).get_dtype() for name in names}
        except SafetensorError as error:
            raise UnfitModel(f"model.name: {path / part} is not a complete weight file ({error}): fetch it again, "
                             "with `git lfs pull` if it is a pointer of a few lines") from error  # fmt: skip
        quantised = [name for name, dtype in dtypes.items() if dtype not in STORED_DTYPES]
        is_marked |= any(name.endswith(marks[0]) or marks[-1] in name for name in every)
        if quantised and not quantization:
            raise UnfitModel(f"model.name: {path / part} has quantised weights ({quantised[0]} in "
                             f"{dtypes[quantised[0]]}), expected float32, bfloat16 or float16: name the checkpoint "
                             "that it comes from")  # fmt: skip
    if form is not None and not is_marked:
        raise UnfitModel(f"model.name: config.json of {name!r} has a quantization_config of {form}, but no tensor "
                         f"*{DEQUANTIZED[form]}, as checkpoints of that form have: name the checkpoint that it comes "
                         "from, or remove quantization_config if its weights are not quantised")  # fmt: skip
    if quantization and not is_marked:
        raise UnfitModel(f"model.name: config.json of {name!r} has a quantization_config of bitsandbytes, but its "
                         "weights are not quantised: remove it there, and set model.quantization to quantise them when "
                         "they are loaded")  # fmt: skip


def _listed_weights(path: Path) -> tuple[str | None, list[str]]:
    """The weight files of a model's directory, and whose list names them; None where it is one file."""
    for each in WEIGHTS:  # in the order in which transformers looks for them
        if (path / each).is_file():
            return None, [each]
        if (listed := path / f"{each}.index.json").is_file():
            return each, sorted(set(json.loads(listed.read_text(encoding="utf-8"))["weight_map"].values()))
    return None, []


def weight_files(path: Path) -> list[Path]:
    """The safetensors files with a model's weights; none where one is missing, or for files of another format."""
    _, parts = _listed_weights(path)
    files = [path / part for part in parts if part.endswith(".safetensors")]
    return files if all(file.is_file() for file in files) else []


def shapes_of(files: Sequence[Path]) -> dict[str, list[int]]:
    """The name and the shape of each tensor in safetensors files."""
    shapes: dict[str, list[int]] = {}
    for each in files:
        with safe_open(each, "np") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in [*file.keys()]}
    return shapes


def is_bitsandbytes(quantization: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is one by which bitsandbytes has stored weights in 4 or 8 bits."""
    is_named = quantization.get("quant_method", "bitsandbytes") == "bitsandbytes"
    return is_named and any(quantization.get(key) for key in LOADED_IN)


def dequantized_form(quantization: Mapping[str, Any] | None) -> str | None:
    """The form, `fp8` or `mxfp4`, of a checkpoint with this quantization_config that is dequantised when it is loaded;
    None for others."""
    given = quantization or {}
    method, is_whole = given.get("quant_method"), given.get("activation_scheme") == "static"
    if method == "fp8" and (is_whole or given.get("weight_block_size", "default") is None):  # one scale for a layer
        return None
    return next((form for form in DEQUANTIZED if form == method), None)


def kind_of(model: ModelConfig, stored: Mapping[str, Any] | None) -> str | None:
    """How the linear layers of the base are stored: `nf4`, `fp4` or `int8`; None for plain weights. `stored` is the
    quantization_config of its checkpoint, which counts where bitsandbytes has quantised that."""
    if not stored or not is_bitsandbytes(stored):
        return model.quantization
    is_eight_bit = stored.get("load_in_8bit") or stored.get("_load_in_8bit")
    return "int8" if is_eight_bit else str(stored.get("bnb_4bit_quant_type", "fp4"))


def stored_kind(model: ModelConfig, stored: Mapping[str, Any] | None) -> str | None:
    """The form in which the base has its linear layers, or its checkpoint where that is dequantised when it is loaded;
    None where both are plain. `stored` is the checkpoint's quantization_config."""
    return dequantized_form(stored) or kind_of(model, stored)


def require_quantizable(config: Config, stored: Mapping[str, Any] | None) -> None:
    """Raise UnfitModel where the base is quantised and this run cannot train on it; `stored` is the quantization_config
    of its checkpoint."""
    form, asked = dequantized_form(stored), config.model.quantization
    kind = stored_kind(config.model, stored)
    if kind is None:
        return
    origin = "dequantised when it is loaded" if form else "bitsandbytes"
    what = f"a base in {kind} (model.quantization)" if asked else f"a checkpoint in {kind} ({origin})"
    if asked not in (None, kind):
        raise UnfitModel(f"model.quantization: {asked!r} given, expected null: the checkpoint of {config.model.name!r} "
                         f"is quantised already, in {kind}")  # fmt: skip
    if config.lora is None and form is None:
        raise UnfitModel(f"lora: null given with {what}, expected adapters: quantised weights cannot be trained")
    if form is None:
        require_package()


def model_path(model: ModelConfig) -> str:
    """The argument of `from_pretrained`. Raises ValueError for a path without a model."""
    return str(toy_path(model.name)) if model.name in MODELS else model_place(model.name, "model.name")


def require_package() -> None:
    """Raise UnfitModel where bitsandbytes, which quantises, is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise UnfitModel(f"model.quantization: quantised weights need the package {PACKAGE}, which is not installed: "
                         "pip install 'grpo_dist[quantized]'")  # fmt: skip


def require_unsharded(is_quantized: bool, shards_weights: bool) -> None:
    """Raise UnfitModel where ZeRO-3 or FSDP2 would shard a quantised base."""
    if is_quantized and shards_weights:
        raise UnfitModel("model.quantization: a quantised base given with ZeRO-3 or FSDP2, which would shard it, "
                         "expected DDP, ZeRO-1 or ZeRO-2: start with accelerate_configs/zero2.yaml")  # fmt: skip


def require_replay(rollout: RolloutConfig, has_experts: bool, kind: str) -> None:
    """Raise ValueError where replay is asked for and a model of this type has no experts."""
    require(rollout.routing_replay is not True or has_experts, "rollout.routing_replay", True,
            f"auto or false for a model without experts ({kind})")  # fmt: skip


def require_divisors(config: Config, num_ranks: int | None, heads: int | None, obstacle: str | None = None) -> None:
    """Raise ValueError where train.sequence_parallel_size divides the ranks or the attention heads with a remainder
    (None where a number is not known), or where `obstacle` keeps the model's prompts from being shared."""
    key, size = "train.sequence_parallel_size", config.train.sequence_parallel_size
    require(size == 1 or obstacle is None, key, size, f"1 for {config.model.name}, whose tokens cannot be divided "
            f"among ranks: {obstacle}")  # fmt: skip
    if num_ranks is not None:
        require(num_ranks % size == 0, key, size, f"a divisor of the number of ranks, {num_ranks}")
    if heads is not None:
        require(heads % size == 0, key, size, f"a divisor of the {heads} attention heads of {config.model.name}")


def some_names(names: Sequence[str]) -> str:
    """A list of names for a message, cut off where it is long."""
    return ", ".join(names[:_SHOWN_NAMES]) + (" …" if len(names) > _SHOWN_NAMES else "")
