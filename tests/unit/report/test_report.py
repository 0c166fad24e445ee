"""What a report is made of: each pure function beside a slow twin, and the files of a run as kills leave them."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs_on_disk import write_run

from grpo_dist.checkpoint.store import complete
from grpo_dist.cli.main import main
from grpo_dist.config.values import flat
from grpo_dist.report.embedding import cut, encoded, harmless
from grpo_dist.report.page import render, write_report
from grpo_dist.report.reading import FIELDS, read_completions, read_run
from grpo_dist.report.shaping import (
    OTHER,
    UNSCORED,
    agreement,
    answer_map,
    change,
    columns,
    curves,
    is_clear_share,
    number_map,
    round_width,
    run_names,
    spread,
    variants,
)
from grpo_dist.text.plain import MOST_LABEL_CHARACTERS, UNSEEN, answer_of, visible

HOSTILE = "</script><script>alert(1)</script><!--\x00\x1b[31mred\x1b[0m\u202eevil\u2066\u2028\u2029\ud800\ufeff"
NUMBERS = st.floats(-1e6, 1e6)


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    """One list of all."""
    return list(itertools.chain.from_iterable(lists))


@given(st.lists(NUMBERS, max_size=80))
def test_a_change_is_clear_beyond_twice_its_error(values: list[float]) -> None:
    window = max(3, len(values) // 10)
    result = change(values)
    if len(values) < 2 * window:
        assert result is None
        return
    first, last = np.array(values[:window]), np.array(values[-window:])
    error = np.sqrt(first.var(ddof=1) / window + last.var(ddof=1) / window)
    assert result is not None and result.window == window
    assert np.allclose([result.before, result.after], [first.mean(), last.mean()])
    assert result.is_clear == (abs(last.mean() - first.mean()) > 2 * error) or math.isclose(
        abs(last.mean() - first.mean()), 2 * error, rel_tol=1e-6, abs_tol=1e-6)  # fmt: skip


def test_change_tells_learning_from_noise() -> None:
    noise = np.random.default_rng(0).normal(0.5, 0.1, 100)
    assert not change(noise.tolist()).is_clear
    assert change((noise + np.linspace(0, 0.5, 100)).tolist()).is_clear


def test_only_options_besides_the_seed_make_a_variant() -> None:
    config = {"train": {"seed": 1, "steps": 5}, "rewards": [{"name": "a", "args": {}}], "betas": [0.9, 0.99]}
    options = flat(config, numbered=True)
    assert options == {"train.seed": 1, "train.steps": 5, "rewards.0.name": "a", "rewards.0.args": {},
                       "betas": [0.9, 0.99]}  # fmt: skip
    assert variants([options, options | {"train.seed": 2}, options | {"train.steps": 6}, options]) == [0, 0, 1, 0]


def test_names_tell_runs_apart() -> None:
    assert run_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert run_names(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert run_names(["x/a", "x/a"]) == ["a", "a"]


@given(st.integers(0, 300), st.integers(2, 50))
def test_the_steps_that_are_read_are_spread_evenly(count: int, most: int) -> None:
    places = spread(count, most)
    assert len(places) == min(count, most) and places == sorted(set(places))
    if count:
        assert places[0] == 0 and places[-1] == count - 1
        gaps = np.diff(places)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=150).map(sorted), st.integers(1, 40))
def test_columns_hold_all_steps_in_nearly_equal_parts(steps: list[int], most: int) -> None:
    result = columns(steps, most)
    members = [[step for step in steps if first <= step <= last] for first, last in result]
    assert joined(members) == steps
    assert len(result) == min(most, len(steps))
    assert not result or max(map(len, members)) - min(map(len, members)) <= 1


@given(st.lists(st.dictionaries(st.sampled_from("abc"), NUMBERS | st.none() | st.just(math.nan))), st.integers(1, 9))
def test_a_point_of_a_curve_is_the_mean_of_its_steps(lines: list[dict[str, float | None]], each: int) -> None:
    lines = [line | {"step": step} for step, line in enumerate(lines)]
    result = curves(lines, each)
    assert result["step"] == [min(start + each, len(lines)) - 1 for start in range(0, len(lines), each)]
    for name in "abc":
        values = [line.get(name) for line in lines]
        values = [math.nan if value is None else value for value in values]
        parts = [[v for v in values[start : start + each] if v == v] for start in range(0, len(values), each)]
        expected = [np.mean(part) if part else None for part in parts]
        if name in result:
            assert [v is None for v in result[name]] == [v is None for v in expected]
            assert np.allclose([v for v in result[name] if v is not None], [v for v in expected if v is not None])
        else:
            assert expected == [None] * len(expected)


def test_totals_are_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was measured in few steps, and however few points are drawn; runs side by side have the same steps."""
    runs = []
    for count in (10, 7):
        run = write_run(tmp_path / str(count), num_steps=count)
        lines: list[dict[str, float | None]] = [{"step": 0, "time/eval": 8.0, "memory/peak_gib": 1.0}]
        lines += [{"step": step, "time/step": 1.0 + step, "tokens/completion": 10.0 * step, "time/rollout": None,
                   "memory/peak_gib": 5.0 if step == 3 else 2.0} for step in range(1, count + 1)]  # fmt: skip
        lines[5]["time/eval"] = 4.0
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(read_run(run))
    monkeypatch.setattr("grpo_dist.report.page.MOST_CURVE_NUMBERS", 0)
    monkeypatch.setattr("grpo_dist.report.page.LEAST_POINTS", 4)
    data = json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', render(runs), re.S)[1])  # type: ignore[index]
    assert data["steps_a_point"] == 3
    assert [run["totals"] for run in data["runs"]] == [
        {"time/eval": 12.0, "memory/peak_gib": 5.0, "time/step": 65.0, "tokens/completion": 550.0, "steps": 10},
        {"time/eval": 12.0, "memory/peak_gib": 5.0, "time/step": 35.0, "tokens/completion": 280.0, "steps": 7},
    ]
    assert [run["curves"]["step"] for run in data["runs"]] == [[2, 5, 8, 10], [2, 5, 7]]
    assert data["runs"][0]["curves"]["time/eval"] == [8.0, 4.0, None, None]


ANSWERS = st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9), min_size=1, max_size=20)


@given(ANSWERS, st.integers(1, 7), st.integers(1, 9))
def test_answer_map(answers: list[list[str]], most_rows: int, most_columns: int) -> None:
    steps = [3 * place + 1 for place in range(len(answers))]
    result = answer_map([Counter(each) for each in answers], steps, most_rows, most_columns)
    assert result.columns == columns(steps, most_columns)
    assert len(set(result.rows) - {OTHER}) == min(most_rows, len(set(joined(answers))))
    for place, (first, last) in enumerate(result.columns):
        given_then = joined(each for step, each in zip(steps, answers, strict=True) if first <= step <= last)
        for row, shares in zip(result.rows, result.shares, strict=True):
            expected = np.mean([a not in result.rows if row == OTHER else a == row for a in given_then])
            assert math.isclose(shares[place], expected, abs_tol=1e-9)


def test_the_work_for_an_answer_map_grows_as_the_answers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all completions differ, an answer is summed a few times, and not again for each other answer."""
    counts = [Counter(f"{step} {place}" for place in range(50)) for step in range(40)]
    visited, total, add = 0, Counter.total, Counter.__add__

    def counted_total(self: Counter[str]) -> int:
        nonlocal visited
        visited += len(self)
        return total(self)

    def counted_add(self: Counter[str], other: Counter[str]) -> Counter[str]:
        nonlocal visited
        visited += len(self)
        return add(self, other)

    monkeypatch.setattr(Counter, "total", counted_total)
    monkeypatch.setattr(Counter, "__add__", counted_add)
    answer_map(counts, range(40), 12, 20)
    assert visited <= 3 * 50 * 40


def test_answers_come_in_the_order_of_their_time() -> None:
    result = answer_map([Counter(["new"] * step + ["old"] * (9 - step)) for step in range(10)], list(range(10)), 5, 10)
    assert result.rows == ["old", "new"]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5, math.nan]), min_size=1), min_size=1, max_size=12),
       st.integers(2, 6))  # fmt: skip
def test_number_map(values: list[list[float]], most_rows: int) -> None:
    result = number_map(values, list(range(len(values))), most_rows, 5)
    numbers = sorted({v for step in values for v in step if v == v})
    for place, (first, last) in enumerate(result.columns):
        then = joined(values[first : last + 1])
        assert math.isclose(sum(row[place] for row in result.shares), 1)
        for row, shares in zip(result.rows, result.shares, strict=True):
            if row == UNSCORED:
                expected = [v != v for v in then]
            elif len(numbers) <= most_rows or " – " not in row:
                expected = [v == float(row) for v in then]
            else:  # a range has its lower end
                low, high = map(float, row.split(" – "))
                expected = [low <= v < high for v in then]
                assert len({v for v in numbers if low <= v < high}) != 1
            assert math.isclose(shares[place], np.mean(expected), abs_tol=1e-9)


def test_numbers_that_are_near_have_rows_of_their_own() -> None:
    near = number_map([[12340.0 + n for n in range(40)], [12345.0] * 40], [1, 2], 5, 5)
    assert near.rows == ["12370 – 12380", "12360 – 12370", "12350 – 12360", "12340 – 12350"]
    assert near.shares == [[0.25, 0], [0.25, 0], [0.25, 0], [0.25, 1]]
    few = number_map([[100.001, 100.002, 12345.0, 12346.0, -0.0, 0.1 + 0.2, 0.3]], [1], 9, 5)
    assert few.rows == ["12346", "12345", "100.002", "100.001", "0.3", "0"]
    assert math.isclose(sum(row[0] for row in few.shares), 1)
    assert number_map([[1 + n * 1e-12 for n in range(30)]], [1], 5, 5).rows == ["1"]


def test_a_share_that_moved_is_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    clear = [is_clear_share(*(rng.random((2, 100)) < 0.4).mean(1), 100) for _ in range(400)]
    assert np.mean(clear) < 0.08, "two samples of one share"
    assert is_clear_share(0.4, 0.6, 100) and not is_clear_share(0.4, 0.6, 20)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 20))
def test_round_width(low: float, span: float, most: int) -> None:
    width, high = round_width(low, low + span, most), low + span
    digits = f"{width:.2e}".split("e")[0].rstrip("0").rstrip(".")
    assert digits in ("1", "2", "2.5", "5")
    assert math.floor(high / width + 1e-9) - math.floor(low / width + 1e-9) < most
    assert span / width > most / 25  # not many times wider than need be: at worst 1 + 1 ranges instead of `most`


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1))
def test_agreement_is_the_share_of_the_most_frequent_answer(pairs: list[tuple[str, int]]) -> None:
    groups = [[a for a, g in pairs if g == group] for group in {g for _, g in pairs}]
    expected = np.mean([max(group.count(a) for a in group) / len(group) for group in groups])
    assert math.isclose(agreement(*zip(*pairs, strict=True)), expected)


def test_an_answer_is_short_and_on_one_line() -> None:
    assert answer_of("  so it\nis  4 ", None) == "so it is 4"
    assert answer_of("so it is 4", lambda text: text[-1]) == "4"
    assert answer_of("no idea", lambda text: None) == "no idea"
    assert len(answer_of("x" * 10**6, None)) == MOST_LABEL_CHARACTERS


def test_the_answer_of_an_episode_is_what_the_model_said_last(tmp_path: Path) -> None:
    trace = {"text": ["4", "\nResult: 9"], "by": "mt", "logprob": [-0.5], "gap": [0.0], "entropy": [0.7]}
    run = read_run(write_run(tmp_path / "run", text=lambda *place: "4\nResult: 9", trace=trace))
    assert all(set(answers) == {"4"} for answers in read_completions(run, 10**6).answers)


@given(st.text(st.characters(), max_size=60), st.integers(0, 50), st.integers(2, 90))
def test_texts_are_visible_and_keep_to_limits(text: str, characters: int, size: int) -> None:
    shown = visible(text)
    assert not UNSEEN.search(shown) and visible(shown) == shown
    assert shown == "".join(visible(character) for character in text)
    start, is_cut = cut(text, characters, size)
    assert visible(text).startswith(start)
    assert len(encoded(start).encode()) <= size
    assert is_cut == (start != visible(text))


def test_hostile_text_stays_text() -> None:
    embedded = encoded(harmless({HOSTILE: [HOSTILE, math.nan, math.inf, Path("x")]}, 1000))
    assert "<" not in embedded and not UNSEEN.search(embedded)
    ((key, values),) = json.loads(embedded).items()
    assert key == values[0] == visible(HOSTILE) and values[1:] == [None, None, "x"]
    for named in ("␀", "␛[31m", "⟨U+202E⟩", "⟨U+2028⟩", "⟨U+D800⟩"):
        assert named in key
    assert harmless("x" * 30, 10) == "x" * 10 + " … (20 more characters)"


def test_after_a_kill_each_step_is_there_once(tmp_path: Path) -> None:
    """Steps done twice, a line torn off, and completions of steps that have to be done again."""
    run = write_run(tmp_path / "run", num_steps=8)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:6] + lines[4:6]) + '{"step": 6, "rew')
    result = read_run(run)
    assert [line["step"] for line in result.lines] == list(range(6))
    assert list(result.files) == list(range(1, 6))
    assert {row[FIELDS.index("step")] for row in read_completions(result, 10**6).rows} == set(range(1, 6))


def test_a_sample_keeps_to_its_size_and_meets_prompts_again(tmp_path: Path) -> None:
    texts = {0: "short", 1: "<" * 30_000, 2: HOSTILE.encode("utf-8", "replace").decode() * 500, 3: "x" * 10**5}
    run = read_run(write_run(tmp_path / "run", text=lambda step, group, sample: texts[sample], num_groups=9))
    everything, some = read_completions(run, 10**8), read_completions(run, 400_000)
    assert len(everything.rows) == everything.total == some.total == 12 * 9 * 4
    assert len(encoded([some.rows, some.prompts]).encode()) <= 400_000
    assert 12 <= len(some.rows) < len(everything.rows)
    by_step: dict[int, set[int]] = {}
    for row in some.rows:
        by_step.setdefault(row[FIELDS.index("step")], set()).add(row[0])
    assert len(by_step) == 12 and len(set.union(*by_step.values())) < sum(map(len, by_step.values())) / 2
    for row in everything.rows:
        assert row[FIELDS.index("cut_from")] in (0, 30_000, 10**5, len(texts[2]))


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    path = write_report([write_run(tmp_path / "run", text=lambda *_: HOSTILE.replace("\ud800", ""))])
    page = path.read_text()
    assert path.name == "report.html" and [each.name for each in path.parent.glob("*report*")] == ["report.html"]
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|%%\w+%%", page)
    assert "default-src 'none'" in page


def test_a_long_run_keeps_under_20_megabytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=60, text=lambda *_: "<\u202e" * 1000, num_groups=12)
    lines = [{"step": step, **{f"metric/{n}": step / 7 for n in range(60)}} for step in range(4_000)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(render([read_run(run)]).encode()) < 20e6


def test_no_run_waits_for_pandas(tmp_path: Path) -> None:
    """pyarrow imports it for tables of several files, which takes a second, or the process where it does not fit."""
    run = write_run(tmp_path / "run")
    (tmp_path / "pandas.py").write_text("raise SystemExit('imported')")
    done = subprocess.run([sys.executable, "-m", "grpo_dist", "report", str(run)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False)  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    shutil.copy(run / "completions/step_000002.parquet", run / "completions/step_000002 (copy).parquet")
    assert main(["report", str(run)]) == 0, "a copy is no step"
    for table in (pa.table({"step": [2]}), None):
        path = run / "completions/step_000002.parquet"
        path.write_bytes(b"PAR1") if table is None else pq.write_table(table, path)
        assert main(["report", str(run)]) == 2
        assert f"{path} is damaged, or not as this version" in capsys.readouterr().err

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patched:  # which `glob` takes for empty directories
        patched.setattr(Path, "iterdir", refuse)
        assert main(["report", str(run)]) == 2
        assert f"Permission denied: '{run / 'completions'}'" in capsys.readouterr().err
        with pytest.raises(PermissionError):
            complete(run)
    (run / "alarms.jsonl").write_text('{"message": "?"}\n')
    assert main(["report", str(run)]) == 2
    assert "alarms.jsonl, line 1" in capsys.readouterr().err
    target = tmp_path / "none" / "page.html"
    assert main(["report", str(write_run(tmp_path / "other")), "--out", str(target)]) == 2
    assert f"'{target}'" in capsys.readouterr().err, "not a temporary file"


def test_the_verb_writes_one_page_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    assert main(["report", *runs, "--out", str(tmp_path / "both.html")]) == 0
    assert "both.html" in capsys.readouterr().out and (tmp_path / "both.html").stat().st_size > 10_000
    assert main(["report", str(tmp_path)]) == 2
    assert "expected metrics.jsonl" in capsys.readouterr().err
    assert main(["report", runs[0], "--what", "x"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["report", runs[0], "--ot", "x"])
