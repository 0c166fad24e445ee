"""A run that goes on from another one's adapter: on any number of ranks, with the KL from where it began."""

from __future__ import annotations

from pathlib import Path

from launching import adapters, completions, metrics, relative_difference, train

KL = ("--loss.kl_coeff", "0.04", "--train.num_train_steps", "2")


def test_a_run_goes_on_from_an_adapter(tmp_path: Path) -> None:
    first = train(None, 1, tmp_path / "first", "--train.num_train_steps", "3")
    adapter = ("--model.name", str(first / "final" / "adapter"))
    one = train(None, 1, tmp_path / "one", *adapter, *KL)
    two = train("zero2", 2, tmp_path / "two", *adapter, *KL)
    from_base = train(None, 1, tmp_path / "base", *adapter, *KL, "--reference.model", "base")
    before, after = metrics(one)[1:]
    assert before["ratio/mean"] == 1.0 and abs(before["kl"]) < 1e-9 < after["kl"]
    assert metrics(from_base)[1]["kl"] > 1e-5
    assert [row["completion"] for row in completions(two)] == [row["completion"] for row in completions(one)]
    assert 0 < relative_difference(adapters(one), adapters(first)) < 0.5
    assert relative_difference(adapters(one), adapters(two)) <= 1e-4
