"""The curriculum in a real run: a resumed run is what it would have been, and ranks change nothing."""

from __future__ import annotations

from pathlib import Path

from launching import adapters, completions, relative_difference, train, without_its_last_step

OPTIONS = (
    "--data.curriculum.low", "0.3", "--data.curriculum.high", "0.7", "--train.save_every", "2",
    "--train.batch_size", "4", "--data.keep.answer", '["1", "2", "3"]',
)  # fmt: skip


def test_a_resumed_curriculum_goes_on_as_it_would_have(tmp_path: Path) -> None:
    whole = train(None, 1, tmp_path / "whole", *OPTIONS)
    resumed = without_its_last_step(whole, tmp_path / "resumed")
    train(None, 1, resumed, *OPTIONS)
    assert relative_difference(adapters(whole), adapters(resumed)) == 0
    two = train("ddp", 2, tmp_path / "two", *OPTIONS)
    for other in (resumed, two):
        assert [row["prompt_index"] for row in completions(other)] == [
            row["prompt_index"] for row in completions(whole)
        ]
    assert relative_difference(adapters(whole), adapters(two)) < 1e-4
