"""Stop strings, banned tokens and the fewest new tokens: against slow twins, and the same in every engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.config.schema import RolloutConfig
from grpo_dist.model import attention
from grpo_dist.rollout import (
    Decoder,
    NativeDecoder,
    PagedDecoder,
    Request,
    RowDecoder,
    Sampling,
    decode_all,
    paged_obstacle,
)
from grpo_dist.rollout.native.kernel import KernelStep
from grpo_dist.rollout.native.llama import LlamaStep
from grpo_dist.rollout.sampling import Rules, draw, sampling_with
from grpo_dist.rollout.stop import Matching, stop_strings
from grpo_dist.text.tokens import CompletionTexts
from grpo_dist.types import Trajectory

ENDS, MOST = [2, 3], 30
BYTES = PretrainedConfig(vocab_size=257)
PIECES = [
    b"",
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"<",
    b">",
    b"</",
    b"a>",
    b"</a>",
    b"bb</a",
    "é".encode()[:1],
    "é".encode()[1:],
]


def naive_end(ids: Sequence[int], spelled: list[bytes], strings: Sequence[str], begin: int) -> int | None:
    """The first token after which the text has more occurrences that end in it, by decoding every beginning anew."""
    for length in range(1, len(ids) + 1):
        text = b"".join(spelled[number] for number in ids[:length]).decode(errors="replace")
        before = b"".join(spelled[number] for number in ids[: length - 1])
        if length > begin and any(_ends(text, before, string) for string in strings):
            return length
    return None


def _ends(text: str, before: bytes, string: str) -> bool:
    """Whether the string occurs in the text and does not only in what was there before the last token."""
    places = [place for place in range(len(text)) if text.startswith(string, place)]
    return any(len(text[: place + len(string)].encode()) > len(before) for place in places)


@given(
    st.lists(st.sampled_from(["a", "b", "</a>", "ab", "aba", "aa", "é"]), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=14), st.integers(0, 6),
)  # fmt: skip
@settings(max_examples=80)
def test_the_automaton_finds_what_decoding_finds(strings: list[str], ids: list[int], begin: int) -> None:
    whole = b"".join(PIECES[number] for number in ids)
    if b"\xc3" in whole.replace("é".encode(), b"") or b"\xa9" in whole.replace("é".encode(), b""):
        return  # broken characters, whose replacement has another length
    stop = stop_strings(strings, PIECES)
    assert stop.first(ids, begin) == naive_end(ids, PIECES, strings, begin)
    assert stop.first(ids) == naive_end(ids, PIECES, strings, 0)
    matching = Matching(stop, torch.device("cpu"))
    matching.grow(2)
    hits = [bool(matching.step(torch.tensor([number]), torch.tensor([1]))) for number in ids]
    assert next((n + 1 for n, hit in enumerate(hits) if hit and n >= begin), None) == stop.first(ids, begin)


@pytest.fixture(scope="module")
def model() -> dict[str, nn.Module]:
    """One random model under both attentions."""
    config = Qwen2Config(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip
    torch.manual_seed(0)
    shared = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention.NAME).eval()
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    plain.load_state_dict(shared.state_dict())
    return {"shared": shared, "plain": plain}


SPELLED = [PIECES[number % 11] for number in range(61)]
REQUESTS = [Request(group, number, list(range(5 + group, 15 + 3 * group)), stream_key(3, group, number))
            for group in range(3) for number in range(4)]  # fmt: skip
with_paged = pytest.mark.skipif(paged_obstacle() is not None, reason=str(paged_obstacle()))
ENGINES: dict[str, Decoder] = {
    "rows": RowDecoder(ENDS, MOST), "modules": NativeDecoder(ENDS, MOST, 200),
    "seldom": NativeDecoder(ENDS, MOST, 1 << 20, steps_between_checks=8, copied_prompt=0),
    "operations": NativeDecoder(ENDS, MOST, 1 << 20, step_of=LlamaStep),
    "compiled": NativeDecoder(ENDS, MOST, 1 << 20, step_of=KernelStep, copied_prompt=0),
    "paged": PagedDecoder(ENDS, MOST, 1 << 20),
}  # fmt: skip
SAMPLING = {
    "stop": Sampling(stop=stop_strings(["</a>", "bab"], SPELLED)),
    "stop late": Sampling(0.8, stop=stop_strings(["a"], SPELLED), min_new_tokens=7),
    "bans": Sampling(0.9, top_p=0.9, banned=(5, 9, 20), min_new_tokens=MOST - 1),
    "greedy": Sampling(greedy=True, banned=(5, 9, 20), min_new_tokens=4, stop=stop_strings(["bb"], SPELLED)),
}


def in_engine(name: str, model: dict[str, nn.Module], sampling: Sampling, requests: list[Request]) -> list[Trajectory]:
    return decode_all(ENGINES[name], model["plain" if name == "rows" else "shared"], requests, sampling)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=with_paged) if name == "paged" else name for name in ENGINES]
)
@pytest.mark.parametrize("kind", SAMPLING)
def test_every_engine_ends_where_the_twin_does(kind: str, name: str, model: dict[str, nn.Module]) -> None:
    sampling = SAMPLING[kind]
    # a request that goes on after a tool has answered counts what came before it
    requests = [replace(request, offset=3 * (request.sample == 3)) for request in REQUESTS]
    endless = in_engine("rows", model, replace(sampling, stop=None), requests)
    strings = sampling.stop.strings if sampling.stop else ()
    ended = 0
    for got, free, request in zip(in_engine(name, model, sampling, requests), endless, requests, strict=True):
        cut = naive_end(free.ids, SPELLED, strings, sampling.min_new_tokens - request.offset)
        assert got.ids == free.ids[:cut]
        assert got.logprobs == pytest.approx(free.logprobs[:cut], abs=1e-4)
        assert got.finished == (cut is not None or free.finished)
        first_ending = next((n for n, number in enumerate(got.ids) if number in ENDS), MOST)
        assert first_ending >= sampling.min_new_tokens - request.offset
        assert not {*got.ids} & {*sampling.banned}
        ended += cut is not None
    assert not strings or ended > 2, "the test needs completions that a stop string ends"


@pytest.mark.usefixtures("kernel")
def test_a_request_for_so_many_tokens_goes_on(model: dict[str, nn.Module]) -> None:
    requests = [replace(request, ignore_end=True, max_new_tokens=12) for request in REQUESTS[:3]]
    for name in ("rows", "modules", "compiled"):
        drawn = in_engine(name, model, SAMPLING["stop"], requests)
        assert [(len(each.ids), each.finished) for each in drawn] == [(12, False)] * 3


def test_bans_of_the_kernel_that_draws() -> None:
    rules = Rules(Sampling(banned=(4, 7), min_new_tokens=2), [1, 4], torch.device("cpu"))
    for _ in range(2):
        assert rules.bans and rules.bans_of(9).tolist() == [0, 1, 0, 0, 2, 0, 0, 2, 0]
    assert Rules(Sampling(min_new_tokens=1), [1], torch.device("cpu")).bans
    assert not Rules(Sampling(), [1], torch.device("cpu")).bans


def test_a_trajectory_ends_by_an_id_or_by_a_text() -> None:
    stop = stop_strings(["b"], [b"a", b"b", b"c", b""])
    for ids, by_text, end in (
        ([0, 3], False, True),
        ([0, 2], False, False),
        ([0, 1], True, True),
        ([1, 0], True, False),
    ):
        assert Sampling(stop=stop).ends(ids, 0, [3]) is end
        assert Sampling().ends(ids, 0, [3]) is (end and not by_text)


def test_draws_with_bans_against_python_numbers() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 11, generator=generator) * 2
    sampling = Sampling(0.7, top_k=3, min_p=0.05, banned=(4, 7), min_new_tokens=20)
    rules = Rules(sampling, [1, 2], torch.device("cpu"))
    seen = set()
    for place in range(40):
        possible = {*range(11)} - {4, 7} - ({1, 2} if place < 20 else set())
        row = logits[place].double() / 0.7
        weights = {token: math.exp(row[token]) for token in possible}
        kept = sorted(possible, key=lambda token: -weights[token])[:3]
        kept = [token for token in kept if weights[token] >= 0.05 * max(weights.values())]
        for key in range(8):
            token, logprob = draw(
                logits[place : place + 1], torch.tensor([key]), torch.tensor([place]), sampling, rules
            )
            assert int(token) in kept
            assert float(logprob) == pytest.approx(float(torch.log_softmax(row, -1)[token]), abs=1e-5)
            seen.add((place, int(token)))
    assert len(seen) > 60


def test_a_ban_of_all_that_is_likely_leaves_a_distribution() -> None:
    logits = torch.full((1, 5), -200.0)
    logits[0, 3] = 100.0  # the others' probabilities are 0 in float32
    rules = Rules(sampling := Sampling(top_k=1, banned=(3,)), [0], torch.device("cpu"))
    tokens = {int(draw(logits, torch.tensor([key]), torch.tensor([0]), sampling, rules)[0]) for key in range(50)}
    assert tokens == {0, 1, 2, 4}


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's: spaces are a character, and bytes have tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ans>", "▁a", "</", "an"]
    vocabulary, merges = {word: n for n, word in enumerate(words)}, [("▁", "a"), ("a", "n")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_tags() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("</answer>", special=True), AddedToken("<tool>", special=False)])
    return tokenizer


@pytest.mark.parametrize("make", [make_tokenizer, with_tags, sentencepiece])
def test_tokens_spell_the_texts_that_rewards_get(make: Any) -> None:
    tokenizer = make()
    ends = [tokenizer.eos_token_id]
    texts_of = CompletionTexts(tokenizer, ends)
    spelled = texts_of.spelled()
    assert len(spelled) == len(tokenizer) and spelled[ends[0]] == b""
    for text in ("a an é</answer>", " a an", "anan <tool> s> 語", "a  \n\t</a>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(spelled[number] for number in ids).decode() == text
        assert texts_of([[*ids, *ends]]) == [text.removeprefix(" ") if make is sentencepiece else text]
        assert texts_of([[*ids, *ends], []], goes_on=True) == [text, ""]
        assert "".join(texts_of.pieces(ids)) == text


def test_a_special_token_is_a_stop_string_like_any_other() -> None:
    tokenizer, rollout = with_tags(), RolloutConfig(stop=["</answer>"])
    sampling = sampling_with(rollout, tokenizer, [256], PretrainedConfig(vocab_size=300))
    assert sampling.stop is not None and len(sampling.stop.classes) == 300, "logits without a token never stop anything"
    (tag,) = tokenizer.convert_tokens_to_ids(["</answer>"])
    letters = tokenizer("x </answer", add_special_tokens=False)["input_ids"]
    assert sampling.stopped_at([70, tag, 71], 0) == 2
    assert sampling.stopped_at([*letters, 299, *tokenizer(">")["input_ids"]], 0) == len(letters) + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stop": ["<end>"]}, "end it anyway"), ({"banned_tokens": ["ab"]}, "a text of one token"),
     ({"banned_tokens": [257]}, "an id from 0 to 256"), ({"banned_tokens": ["<end>"]}, "or rollout.stop")],
)  # fmt: skip
def test_what_the_tokenizer_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling_with(RolloutConfig(**options), make_tokenizer(), [256], BYTES)


def test_banned_tokens_by_text_and_id() -> None:
    rollout = RolloutConfig(banned_tokens=["a", " ", 3, "<end>"], stop=["b"])
    tokenizer = make_tokenizer()
    assert sampling_with(rollout, tokenizer, [256], BYTES).banned == tuple(
        sorted([*tokenizer.convert_tokens_to_ids(["a", "Ġ"]), 3, 256])
    )
    rollout = RolloutConfig(banned_tokens=["Ġ"], temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, min_new_tokens=3)
    expected = Sampling(0.5, 0.9, 7, 0.1, banned=tuple(tokenizer.convert_tokens_to_ids(["Ġ"])), min_new_tokens=3)
    assert sampling_with(rollout, tokenizer, [256], BYTES) == expected, "a token is meant by its own spelling, too"


def test_tokens_that_a_tokenizer_puts_around_texts_belong_to_no_string() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 256)])
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert len(tokenizer("a")["input_ids"]) == 2
    (space,) = tokenizer.convert_tokens_to_ids(["Ġ"])
    assert sampling_with(RolloutConfig(banned_tokens=[" "]), tokenizer, [256], BYTES).banned == (space,)
    with pytest.raises(ValueError, match=r"\['a', 'x'\]"):
        sampling_with(RolloutConfig(stop=["X"]), tokenizer, [256], BYTES)


@pytest.mark.parametrize(
    ("options", "key"),
    [({"stop": [""]}, "rollout.stop"), ({"stop": ["x" * 1001]}, "rollout.stop"),
     ({"min_new_tokens": 256}, "rollout.min_new_tokens"), ({"min_new_tokens": -1}, "rollout.min_new_tokens")],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        RolloutConfig(**options)


def test_generation_config_is_named(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    from grpo_dist.config.schema import ModelConfig
    from grpo_dist.model.config_files import ignored_generation_options

    Qwen2Config(vocab_size=61).save_pretrained(tmp_path)
    base = ModelConfig(name=str(tmp_path))
    assert ignored_generation_options(base, RolloutConfig()) is None
    GenerationConfig(eos_token_id=[2], do_sample=True, top_p=0.8, repetition_penalty=1.1).save_pretrained(tmp_path)
    said = ignored_generation_options(base, RolloutConfig())
    assert said is not None and "top_p: 0.8, repetition_penalty: 1.1" in said and "eos" not in said
    assert "top_p" not in str(ignored_generation_options(base, RolloutConfig(top_p=0.8)))
