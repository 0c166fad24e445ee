"""The text of a completion: everything that was sampled but its frame."""

from __future__ import annotations

import re

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from grpo_dist.text.tokens import CompletionTexts, _bytes_of, begun_once, tokens_around

SPECIAL = ("<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, special tokens, an added token that is not special, and a word piece's way with spaces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken("</answer>", special=False)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    made.clean_up_tokenization_spaces = True
    made.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return made


@pytest.mark.parametrize(
    ("sampled", "text"),
    [
        ("<think>a</think>b<|im_end|>", "<think>a</think>b"),
        ("<think> a </think> b .<|endoftext|>", "<think> a </think> b ."),
        ("<|begin|>x<tool_call>{}<|endoftext|>", "x<tool_call>{}"),
        ("x<|im_start|>user", "x<|im_start|>user"),
        ("it 's  fine .  \n", "it 's  fine .  \n"),
        ("<answer>1</answer>", "<answer>1</answer>"),
        ("", ""),
    ],
)
def test_what_a_reward_sees(tokenizer: PreTrainedTokenizerFast, sampled: str, text: str) -> None:
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>", "</answer>")]
    ids = tokenizer(sampled, add_special_tokens=False)["input_ids"]
    assert CompletionTexts(tokenizer, ends)([ids, []]) == [text, ""]


def test_tokens_that_only_the_model_has_have_no_text() -> None:
    """Vocabularies of models are padded, and slow tokenizers know no text for the rest."""
    slow = ByT5Tokenizer(extra_ids=0)
    assert CompletionTexts(slow, [slow.eos_token_id])([[*slow("it")["input_ids"], 290]]) == ["it"]


def test_a_think_reward_can_be_won(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("<think>so</think>4<|im_end|>", add_special_tokens=False)["input_ids"]
    (text,) = CompletionTexts(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])([ids])
    assert re.fullmatch(r"<think>.*</think>\d", text)


def test_pieces_are_the_texts_of_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """A character of several tokens is the first one's; a broken one is shown as such."""
    texts, text = CompletionTexts(tokenizer, []), "so é 𝄞 , 4 .\n<tool_call>"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    pieces = texts.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text + "<|endoftext|>"
    first = pieces.index("𝄞")
    assert pieces[first : first + 5] == ["𝄞", "", "", "", " "] and pieces[-2:] == ["<tool_call>", "<|endoftext|>"]
    assert texts.pieces(ids[: first + 2])[-2:] == ["\ufffd", ""]
    assert texts.pieces(ids[first : first + 2] + ids[:1]) == ["\ufffd", "", "s"]
    assert texts.pieces([ids[first]] * 6 + ids[-1:])[-1] == "<|endoftext|>"
    assert texts.pieces([]) == []


def test_the_bytes_that_vocabularies_write() -> None:
    """As those of GPT-2 and of SentencePiece do; every byte that UTF-8 has is in the text."""
    text = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000)]))
    ((written, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert len({*text.encode()}) == 256 - 13 and _bytes_of(written) == text.encode()
    assert _bytes_of("<0x0A>") == b"\n" and _bytes_of("\u2581n") == "\u2581n".encode()


def test_what_a_tokenizer_puts_around_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokens_around(tokenizer) == ([], [])
    framing = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    framing.post_processor = processors.TemplateProcessing(
        single="<|begin|> <|begin|> $A <|endoftext|>", special_tokens=[("<|begin|>", begin), ("<|endoftext|>", end)]
    )
    around = PreTrainedTokenizerFast(tokenizer_object=framing, bos_token="<|begin|>", eos_token="<|endoftext|>")
    assert tokens_around(around) == ([begin, begin], [end])
    assert begun_once([begin, begin, 5], [begin]) == [begin, 5] == begun_once([begin, 5], [begin])
    assert begun_once([begin, 5], [begin, begin]) == [begin, 5] and begun_once([5, 5], []) == [5, 5]
