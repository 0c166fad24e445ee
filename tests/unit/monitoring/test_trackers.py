"""Trackers with their real libraries, in one process, read back from what they wrote; and trackers that misbehave."""

from __future__ import annotations

import importlib
import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_dist.monitoring import trackers
from grpo_dist.monitoring.trackers import Entry, Mirror, Source, Table, require_known, run_name

CONFIG = {"train.seed": 1, "optim.betas": [0.9, 0.99], "data.system_prompt": None, "rewards.0.args.token": "<redacted>"}
HOSTILE = "a|b\n<script>alert(1)</script> **x** \x1b[31m"
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "trackio")}


def entry(step: int) -> Entry:
    """A step with a histogram, and with a table every other step."""
    table = Table(["completion", "reward"], [[HOSTILE, 0.5]])
    return Entry(step, {"reward/mean": step / 4, "kl": 0.25}, {"reward/distribution": np.array([0, 1, 1], np.float32)},
                 {} if step % 2 else {"completions/sample": table})  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All of them at once: a run of six steps that was killed, and went on from its fourth."""
    directory = tmp_path_factory.mktemp("trackers") / "run"
    directory.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("TRACKIO_DIR", str(directory / "trackio"))
        patch.setattr(trackers, "CLOSE_SECONDS", 60.0)
        for first_step, steps in ((-1, range(7)), (4, range(5, 9))):
            source = Source(directory, run_name(directory, first_step), CONFIG, first_step)
            mirrors = [Mirror(kind, source) for kind in ("tensorboard", *filter(INSTALLED.get, INSTALLED))]
            for step in steps:
                for mirror in mirrors:
                    mirror.log(entry(step))
            for mirror in mirrors:
                mirror.close()
                assert not mirror._broken
        yield directory


def test_tensorboard_has_each_step_once(written: Path) -> None:
    events = EventAccumulator(str(written / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    for name, value in (("reward/mean", None), ("kl", 0.25)):
        scalars = events.Scalars(name)
        assert [each.step for each in scalars] == list(range(9))
        assert [each.value for each in scalars] == [value or step / 4 for step in range(9)]
    histogram = events.Histograms("reward/distribution")[-1].histogram_value
    assert (histogram.num, histogram.sum, histogram.max) == (3, 2, 1)
    text = events.Tensors("completions/sample/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "<script>" not in text and "**x**" not in text and "a&#124;b<br>" in text and text.count("\n") == 2
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| train.seed | 1 |" in config and "redacted" in config


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run's file, which is a log in LevelDB's format behind seven bytes of its own."""
    protocol = importlib.import_module("wandb.proto.wandb_internal_pb2")
    written, place, text = path.read_bytes(), 7, b""
    while place + 7 <= len(written):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(written[place + 4 : place + 6], "little"), written[place + 6]
        text += written[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a complete record, or its last part
            yield protocol.Record.FromString(text)
            text = b""


@pytest.mark.skipif(not INSTALLED["wandb"], reason="wandb is not installed: pip install 'grpo_dist[wandb]'")
def test_wandb_offline(written: Path) -> None:
    files = sorted(written.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # one run, of two starts
    assert run_name(written, 4) in files[0].name
    history: dict[str, list[Any]] = {}
    config = {}
    for file in files:
        for record in wandb_records(file):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.history.item:
                history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert config["train.seed"] == 1 and config["rewards.0.args.token"] == "<redacted>"
    assert history["reward/mean"] == [step / 4 for step in (*range(7), *range(5, 9))]
    assert history["reward/distribution/_type"][0] == "histogram"
    assert sum(history["reward/distribution/values"][0]) == 3
    table = next(written.glob("wandb/offline-run-*/files/media/table/completions/sample_*.json"))
    assert json.loads(table.read_text())["data"] == [[HOSTILE, 0.5]]


@pytest.mark.skipif(not INSTALLED["trackio"], reason="trackio is not installed: pip install 'grpo_dist[trackio]'")
def test_trackio_local(written: Path) -> None:
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    assert storage.get_runs("grpo_dist") == [run_name(written, 4)]
    logs = storage.get_logs("grpo_dist", run_name(written, 4))
    rewards = [(line["step"], line["reward/mean"]) for line in logs if "reward/mean" in line]
    assert sorted(set(rewards)) == [(step, step / 4) for step in range(9)]
    assert next(line["reward/distribution"]["values"] for line in logs if "reward/distribution" in line)[-1] == 2
    tables = [line["completions/sample"] for line in logs if "completions/sample" in line]
    assert HOSTILE in json.dumps(tables[0], ensure_ascii=False).replace("\\n", "\n").replace("\\u001b", "\x1b")
    assert storage.get_run_config("grpo_dist", run_name(written, 4))["train.seed"] == 1


class Waiting(GeneralTracker):
    """Hangs in its first call of `log`, or fails there."""

    name, requires_logging_directory, main_process_only = "waiting", False, False
    allowed = threading.Event()
    fails = False

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert all(isinstance(value, (bool, int, float, str)) for value in values.values())

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        if self.fails:
            raise ConnectionError("the server is on fire")
        self.allowed.wait()


@pytest.mark.parametrize("fails", [False, True], ids=["hangs", "fails"])
def test_a_run_goes_on(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "waiting", Waiting)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "MOST_QUEUED", 5)
    monkeypatch.setattr(Waiting, "fails", fails)
    Waiting.allowed.clear()
    mirror = Mirror("waiting", Source(tmp_path, "run", CONFIG, -1))
    for step in range(20):
        mirror.log(entry(step))
    mirror.close()
    assert ("the server is on fire" if fails else "the run does not wait") in caplog.text
    Waiting.allowed.set()


def test_the_mark_of_a_run_stays_until_it_starts_anew(tmp_path: Path) -> None:
    first = run_name(tmp_path, -1)
    assert run_name(tmp_path, 5) == first != run_name(tmp_path, -1)


def test_an_unknown_tracker_is_named() -> None:
    with pytest.raises(ValueError, match=r"'tensorbord' given.*did you mean 'tensorboard'"):
        require_known(["wandb", "tensorbord"])
    require_known(list(LOGGER_TYPE_TO_CLASS))
