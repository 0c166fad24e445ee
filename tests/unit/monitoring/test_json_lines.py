"""Lines that a run wrote: cut by the end of a machine, and changed by hand."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_dist.config.schema import Config
from grpo_dist.monitoring.json_lines import read_history, read_json_lines
from grpo_dist.monitoring.recorder import Recorder
from grpo_dist.report.reading import read_run

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    "text", ['{"a": 1}\n{"a": 2}\n', '{"a": 1}\r\n\r\n{"a": 2}\r\n{"a": 3', '\n{"a": 1}\n\n{"a": 2}\n\0\0\0']
)
def test_complete_lines(text: str, tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(text.encode())
    assert read_json_lines(tmp_path / "lines") == [{"a": 1}, {"a": 2}]
    assert read_json_lines(tmp_path / "none") == []


@pytest.mark.parametrize("line", [b"5", b'{"a": ', b"\xff", b"\0\0", b'{"a": 1} {"a": 2}'])
def test_a_broken_line_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"lines, line 2: .* expected a JSON object"):
        read_json_lines(tmp_path / "lines")


@pytest.mark.parametrize("line", ['{"a": 1}', '{"step": "2"}', '{"step": null}', '{"step": true}', '{"step": 1.5}'])
def test_a_line_without_its_step_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    for read in (read_history, read_run):
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: .* with a whole number as 'step'"):
            read(tmp_path)


def test_a_step_s_alarms_are_written_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    recorder = Recorder(replace(config, logging=replace(config.logging, trackers=[])), tmp_path, -1)
    written: list[str] = []
    monkeypatch.setattr("grpo_dist.monitoring.recorder.append_json_line", lambda path, _: written.append(path.name))
    (alarm,) = recorder.metrics({"step": 1, "reward/mean": 0.0, "update/skipped": 1.0})
    assert alarm.name == "bad_update" and written == ["alarms.jsonl", "metrics.jsonl"]


def test_a_record_that_lacks_steps_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = "".join(json.dumps({"step": step}) + "\n" for step in range(5))
    (tmp_path / "metrics.jsonl").write_text(lines[:-3])
    config = Config()
    config = replace(config, logging=replace(config.logging, trackers=[]))
    with caplog.at_level(logging.WARNING):
        Recorder(config, tmp_path, 3).close()
        assert not caplog.text
        Recorder(config, tmp_path, 6).close()
    assert "lacks 3 of the steps 0 to 6, which were done before (the first is step 4)" in caplog.text


def test_a_training_that_begins_anew_says_which_records_it_replaces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config()
    config = replace(config, logging=replace(config.logging, trackers=[]))
    for steps, said in ((1, False), (3, True)):
        (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(steps)))
        with caplog.at_level(logging.WARNING):
            Recorder(config, tmp_path, -1).close()
        assert ("has 2 steps of a start that left no checkpoint" in caplog.text) == said
        assert (tmp_path / "metrics.jsonl").read_text() == ""
