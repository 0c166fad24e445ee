"""The verb `plan`: its options, and what it says of memory that does not suffice."""

from __future__ import annotations

import pytest

from grpo_dist.cli.main import main
from grpo_dist.cli.plan import parse_ranks, parse_size

# --- the verb -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5gib", 3 * 2**29)])
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["80", "GiB", "-3GB", "80GX", ""])
def test_a_size_needs_a_unit(text: str) -> None:
    with pytest.raises(ValueError, match=r"--gpu-memory: .* given, expected a number with its unit"):
        parse_size(text)


def test_ranks_are_read() -> None:
    assert parse_ranks("64,1, 8,8") == [1, 8, 64]
    for text in ("0", "8,", "two"):
        with pytest.raises(ValueError, match="--ranks"):
            parse_ranks(text)


def test_the_verb_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", "configs/quickstart.yaml", "--device", "cpu", "--train.max_tokens_per_pack", "512",
             "--ranks"]  # fmt: skip
    assert main([*words, "1,4"]) == 0
    output, stages = capsys.readouterr()
    assert "importing torch" in stages and "tracing the passes" in stages and "memory of 4 rank(s) with FSDP2" in stages
    assert "0.49 M parameters" in output and "frozen copy" in output and "✗" not in output
    assert main([*words, "1", "--gpu-memory", "10MiB"]) == 1
    output = capsys.readouterr().out
    assert "✗" in output and "1 rank(s): set --" in output and "--train.max_tokens_per_pack 128" in output
