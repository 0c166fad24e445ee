from __future__ import annotations

from grpo_dist.monitoring.progress import Progress


def test_progress_is_said_until_all_have_ended() -> None:
    lines: list[str] = []
    progress = Progress("prompts 1 to 2 of 2", 4, lines.append, seconds=0)
    for number in (1, 2, 1):
        progress.add(number)
    assert lines == ["prompts 1 to 2 of 2: 1 of 4 completions", "prompts 1 to 2 of 2: 3 of 4 completions"]


def test_progress_is_said_from_time_to_time() -> None:
    lines: list[str] = []
    progress = Progress("prompts", 1000, lines.append, seconds=3600)
    for _ in range(500):
        progress.add(1)
    assert lines == []
