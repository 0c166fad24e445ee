"""What a report is made of: the files of a run as kills leave them, texts that others wrote, and the page as a file."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs_on_disk import write_run

from grpo_dist.checkpoint.store import complete
from grpo_dist.cli.main import main
from grpo_dist.report.embedding import cut, encoded, harmless
from grpo_dist.report.page import render, write_report
from grpo_dist.report.reading import FIELDS, read_completions, read_run
from grpo_dist.text.plain import MOST_LABEL_CHARACTERS, UNSEEN, answer_of, visible

HOSTILE = "</script><script>alert(1)</script><!--\x00\x1b[31mred\x1b[0m\u202eevil\u2066\u2028\u2029\ud800\ufeff"


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
    assert list(result.files) == list(range(1, 6)) and result.config["train.num_train_steps"] == 8
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


def test_what_is_read_of_each_step(tmp_path: Path) -> None:
    read = read_completions(read_run(write_run(tmp_path / "run", num_steps=3)), 10**6)
    assert read.steps == [1, 2, 3] and read.lengths == [[3, 4, 5, 6] * 2] * 3
    assert read.answers == [{"0": 4, "1": 4}] * 3 and read.agreement == [1.0] * 3
    scored = [[[0.0 if math.isnan(reward) else 1 + reward for reward in rewards] for rewards in read.rewards]]
    assert scored == [[[2.0, 0.0, 1.0, 1.0] * 2, [2.0, 0.0, 2.0, 1.0] * 2, [2.0, 0.0, 2.0, 2.0] * 2]]
    (tmp_path / "run" / "config.yaml").unlink()
    assert read_run(tmp_path / "run").config == {}


def test_prompts_take_of_the_sample_s_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=1, num_groups=9)
    path = run / "completions" / "step_000001.parquet"
    table = pq.ParquetFile(path).read().to_pydict()
    pq.write_table(pa.table(table | {"prompt": [prompt * 100 for prompt in table["prompt"]]}), path)
    some = read_completions(read_run(run), 5_000)
    assert len(encoded([some.rows, some.prompts]).encode()) <= 5_000 + 3 and 2 <= len(some.prompts) <= 5
    assert len(some.rows) == 4 * len(some.prompts)


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    path = write_report([write_run(tmp_path / "run", text=lambda *_: HOSTILE.replace("\ud800", ""))])
    page = path.read_text()
    assert path.name == "report.html" and [each.name for each in path.parent.glob("*report*")] == ["report.html"]
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|%%\w+%%", page)
    assert "default-src 'none'" in page


def test_a_long_run_keeps_under_20_megabytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=26, text=lambda *_: "<\u202e" * 1000, num_groups=12)
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
    path = run / "completions/step_000002.parquet"
    written = pq.read_table(path)
    nothing = {name: [None] * written.num_rows for name in ("tokens", "prompt", "completion")}
    nulls = [written.drop([name]).append_column(name, pa.array(column)) for name, column in nothing.items()]
    for table in (pa.table({"step": [2]}), *nulls, None):
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
