"""What a model's directory says beside its weights: its tokenizer, its config, and how completions end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers import __version__ as transformers_version

from ..config.places import model_place
from ..config.rollout import RolloutConfig
from ..config.schema import ModelConfig
from ..text.files import near_paths
from ..text.templates import with_variables
from .checks import CANNOT, require_complete_model, require_trainable
from .files import UnfitModel, model_path, require_positions, stored_file

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_NO_SAMPLING = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "use_cache",
                "cache_implementation", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
                "return_dict_in_generate", "transformers_version", "_from_model_config")  # fmt: skip
"""Entries of generation_config.json that do not change what is drawn, or that the engines do take over."""
OUTPUT = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
"""What a model returns beside its logits, whatever its config.json asks for: nothing else is read."""


def hub_options(model: ModelConfig) -> dict[str, Any]:
    """What every file of the model is read with."""
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


@contextmanager
def _names_option(option: str, name: str, place: str) -> Iterator[None]:
    """Inside, an error about a repository says which option named it."""
    what = "tokenizer" if option == "model.tokenizer" else "model"
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise UnfitModel(f"{option}: {name!r} given, a {what} with code of its own, which is not run unless you ask "
                         "for it: read that code, and set model.trust_remote_code: true") from error  # fmt: skip
    except OSError as error:
        if Path(place).is_dir():
            raise
        raise OSError(f"{option}: {name!r} is no directory in {Path.cwd()}{near_paths(name)}, and the hub gives no "
                      f"such {what} here: {error}") from error  # fmt: skip


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with model.chat_template_kwargs in its template, and with a padding token. Without one of its own,
    it is the first end-of-sequence token."""
    require_complete_model(model.name, model_path(model), model.revision)
    if model.tokenizer is None:
        try:  # the tokenizer's class depends on config.json
            with _names_option("model.name", model.name, model_path(model)):
                tokenizer = AutoTokenizer.from_pretrained(model_path(model), **hub_options(model))
        except StrictDataclassError as error:
            raise _unreadable(model, error) from error
    else:
        place = model_place(model.tokenizer, "model.tokenizer", "tokenizer_config.json")
        with _names_option("model.tokenizer", model.tokenizer, place):
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=model.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.name: the tokenizer of {model.name!r} has no end-of-sequence token; all completions "
                         "would end by their length. Set `eos_token` in its tokenizer_config.json")  # fmt: skip
    if not tokenizer("a")["input_ids"]:  # transformers gives this for a directory without tokenizer files
        raise ValueError(f"model.name: the tokenizer of {model.name!r} makes no tokens of a text; are its files "
                         "(tokenizer.json, tokenizer_config.json) beside config.json?")  # fmt: skip
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.chat_template_kwargs:
        tokenizer.chat_template = with_variables(tokenizer, model.chat_template_kwargs)
    return tokenizer


def end_token_ids(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a completion, of the tokenizer and the model's configs, sorted; the log names ids among these
    that are no tokens. Raises UnfitModel for a config that cannot be read."""
    config = load_model_config(model)
    text = config.get_text_config(decoder=True)
    ends = {tokenizer.eos_token_id}
    for part in (config, text, _generation_config(model)):
        given = getattr(part, "eos_token_id", None)
        ends |= set(given if isinstance(given, list) else [given]) - {None}
    if unknown := sorted(end for end in ends if not 0 <= end < text.vocab_size):
        log.warning("eos_token_id of %r has %s, expected tokens of the model (0 to %d): they end nothing",
                    model.name, ", ".join(map(str, unknown)), text.vocab_size - 1)  # fmt: skip
    return sorted(ends - {*unknown})


def _generation_config(model: ModelConfig) -> GenerationConfig | None:
    """The model's generation_config.json; None where it has none. Raises UnfitModel if it is not readable."""
    path = model_path(model)
    try:
        return GenerationConfig.from_pretrained(path, revision=model.revision)
    except (OSError, *CANNOT) as error:
        if isinstance(error, OSError) and stored_file(path, "generation_config.json", model.revision) is None:
            return None  # as many repositories
        raise UnfitModel(f"model.name: generation_config.json of {model.name!r} cannot be read ({error}): correct it, "
                         "or take it out of the model's directory") from error  # fmt: skip


def ignored_generation_options(model: ModelConfig, rollout: RolloutConfig) -> str | None:
    """What the model's generation_config.json asks for and rollouts do not do; None where there is nothing."""
    own = _generation_config(model)
    given = {} if own is None else own.to_diff_dict()
    ignored = {name: value for name, value in given.items()
               if name not in _NO_SAMPLING and value not in (None, False, getattr(rollout, name, None))}  # fmt: skip
    if not ignored:
        return None
    return (f"generation_config.json of {model.name!r} says {', '.join(f'{k}: {v}' for k, v in ignored.items())}: "
            "nothing of it is applied, completions are drawn as `rollout` says")  # fmt: skip


def load_model_config(model: ModelConfig) -> PreTrainedConfig:
    """The model's transformers config. Raises UnfitModel if it is not readable."""
    require_complete_model(model.name, model_path(model), model.revision)
    try:
        with _names_option("model.name", model.name, model_path(model)):
            config = AutoConfig.from_pretrained(model_path(model), **OUTPUT, **hub_options(model))
    except (*CANNOT, StrictDataclassError) as error:
        if isinstance(error, ValueError):
            raise
        raise _unreadable(model, error) from error
    config._attn_implementation = None  # a name in config.json would be used whatever the config of the run asks for
    return config


def stored_dtype(model: ModelConfig) -> torch.dtype:
    """The dtype of the model's weights, as its config.json names it. Raises UnfitModel where it names none."""
    dtype = load_model_config(model).dtype
    if not isinstance(dtype, torch.dtype):
        raise UnfitModel(f"model.name: config.json of {model.name!r} has the dtype {dtype!r}, expected one such as "
                         "'float32': give the one that its weights are stored in")  # fmt: skip
    return dtype


def _unreadable(model: ModelConfig, error: Exception) -> UnfitModel:
    message = " ".join(str(error).split())
    return UnfitModel(f"model.name: transformers {transformers_version} cannot read config.json of {model.name!r} "
                      f"({type(error).__name__}: {message})")  # fmt: skip


def check_model_config(model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Raise ValueError if the model cannot be trained, or is too small for sequences of `longest` tokens or for the
    vocabulary of the tokenizer."""
    require_trainable(model_config, longest)
    text = model_config.get_text_config()
    require_positions(lambda name: getattr(text, name, None), longest)
    padding = getattr(text, "pad_token_id", None)
    if padding is not None and padding >= text.vocab_size:
        raise UnfitModel(f"model.name: pad_token_id {padding} given in config.json, expected a token of the model (0 "
                         f"to {text.vocab_size - 1}), or null: correct it there")  # fmt: skip
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"model.name: the tokenizer has {len(tokenizer)} tokens, the model only {text.vocab_size}: "
            "name a model with the tokenizer that it was trained with"
        )


def short_window(model_config: PreTrainedConfig, longest: int) -> int | None:
    """The sliding window of some layers, if it is shorter than a sequence of `longest` tokens, or None."""
    text = model_config.get_text_config()
    window: int | None = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or []
    slides = bool(window) and (not kinds or "sliding_attention" in kinds)
    return window if slides and window is not None and window < longest else None


def soft_cap(model_config: PreTrainedConfig) -> float | None:
    """The soft cap of attention scores, or None."""
    return getattr(model_config.get_text_config(), "attn_logit_softcapping", None)
