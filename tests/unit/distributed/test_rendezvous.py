"""The ranks of a launch find one another, or a message names those that are missing."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import pytest
import torch

from grpo_dist.distributed import rendezvous
from grpo_dist.distributed.device import resolve_dtype
from grpo_dist.distributed.launch import LaunchError, is_of_one_rank, place_in_launch
from grpo_dist.distributed.rendezvous import Rendezvous, Report, warn_of_idle_gpus


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a launch without a launcher's store, of nobody yet."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(rendezvous, "REMIND_SECONDS", 0.2)


def come(ranks: range | list[int], num_ranks: int, timeout_seconds: float = 20.0) -> dict[int, Any]:
    """Each rank's rendezvous, or the error that it ends with; of ranks that come at the same time."""
    ends: dict[int, Any] = {}

    def of(rank: int) -> None:
        try:
            ends[rank] = Rendezvous.meet(rank, num_ranks, timeout_seconds)
        except LaunchError as error:
            ends[rank] = error

    threads = [threading.Thread(target=of, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_ranks_that_all_come_hear_of_each_other() -> None:
    ends = come(range(3), 3)
    assert [end.reports[0].host for end in ends.values()] == [socket.gethostname()] * 3
    assert all(end.reports == ends[0].reports and end.missing("entered") == [0, 1, 2] for end in ends.values())


def test_who_is_missing_is_named_again_and_again_and_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    ends = come([0, 2], 4, timeout_seconds=1.5)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) > 1
    place = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert lines[-1].startswith(f"2 of 4 ranks have reported to {place}; missing for ")
    assert "rank 1, 3 (the run ends after 2 s)" in lines[-1]
    assert "missing for 2 s: rank 1, 3. Start them with the same address and port" in str(ends[0])
    assert is_of_one_rank(ends[0])


def test_nobody_answers_where_rank_0_should_be(caplog: pytest.LogCaptureFixture) -> None:
    end = come([1], 2, timeout_seconds=1.0)[1]
    assert f"rank 1 on {socket.gethostname()} has had no answer from 127.0.0.1:{os.environ['MASTER_PORT']}" in str(end)
    assert "has no answer from" in caplog.text


def test_a_rank_that_loads_for_long_is_named(caplog: pytest.LogCaptureFixture) -> None:
    ends = come(range(2), 2)
    late = threading.Timer(1.0, ends[1].wait_at, ["loaded the model", 20.0])
    late.start()
    ends[0].wait_at("loaded the model", 20.0)
    late.join()
    assert "1 of 2 ranks have loaded the model; missing for 0 s: rank 1" in caplog.text


def test_a_rank_that_fails_while_it_loads_ends_those_that_wait_for_it() -> None:
    ends = come(range(2), 2)
    assert not ends[1].fail(MemoryError("2 GiB"), 0.0)
    with pytest.raises(LaunchError, match=f"rank 1 on {socket.gethostname()} has failed: MemoryError: 2 GiB"):
        ends[0].wait_at("loaded the model", 20.0)
    assert ends[1].store.add(ends[1]._key("know"), 0) == 2


def test_a_rank_that_fails_before_it_comes_ends_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    late = threading.Timer(0.5, Rendezvous.fail_before, [ValueError("no such file")])
    late.start()
    end = come([0], 2)[0]
    late.join()
    assert f"rank 1 on {socket.gethostname()} has failed: ValueError: no such file" in str(end)


def test_a_rank_that_reaches_nobody_says_itself_what_has_ended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LATE_SECONDS", 0.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):  # rank 0 always does
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(LaunchError, match=r"rank 1 on .*: no such file") if rank == "1" else nullcontext():
            Rendezvous.fail_before(ValueError("no such file"))


def test_a_store_may_outlive_a_run() -> None:
    """What ranks of one launch have passed in a run before, and that one failed, says nothing of the next."""
    before = come(range(2), 2)
    before[0]._set("entered")
    before[1].fail(MemoryError(), 0.0)
    again = come(range(2), 2)
    assert all(end.missing("entered") == [0, 1] for end in again.values())


def test_a_first_collective_that_stands_still_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names this rank, its host and interface, and how far the others came."""
    ended = threading.Event()
    monkeypatch.setattr(rendezvous.os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: None)
    ends = come(range(3), 3)
    with ends[1].first_collective(20.0):
        pass
    ends[0]._set("entered")
    with ends[0].first_collective(0.1):
        assert ended.wait(20)
    output = capsys.readouterr().err
    assert f"error: no answer in 0 s. rank 0 on {socket.gethostname()} does not complete the first" in output
    assert "of the 3 ranks over gloo (GLOO_SOCKET_IFNAME=(not set); it reaches 127.0.0.1:" in output
    assert "by lo 127.0.0.1). Ranks that have completed it: 1; inside: 0; missing: 2. " in output


def test_a_first_collective_that_fails_names_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    ends = come(range(2), 2)
    refused = pytest.raises(LaunchError, match=r"GLOO_SOCKET_IFNAME=nope0.*\nUnable to find address")
    with refused as refusal, ends[0].first_collective(20.0):
        raise RuntimeError("Unable to find address for: nope0\nframes")
    assert "frames" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"RANK": "3"}, r"RANK=3, WORLD_SIZE=\(not set\)"), ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2"),
     ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK=one"), ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
     ({"WORLD_SIZE": "2", "MASTER_ADDR": ""}, "WORLD_SIZE=2 in the environment, but RANK and MASTER_ADDR not"),
     ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 in the environment, but RANK and WORLD_SIZE not"),
     ({"LOCAL_RANK": "x", "RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK=x in the environment, expected a number"),
     ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 in the environment, expected a num"),
     ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 in the environment, but WORLD_SIZE not, as mpirun"),
     ({"PMI_SIZE": "4"}, "PMI_SIZE=4 in the environment")],
)  # fmt: skip
def test_launches_that_are_none(given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message):
        place_in_launch()


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "0"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1)),
        ({"LOCAL_RANK": "-1"}, (0, 1)),
        ({"PMI_SIZE": "1"}, (0, 1)),
        ({"PMI_SIZE": "2", "RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
    ],
)
def test_launches(given: dict[str, str], place: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert place_in_launch() == place


def test_a_launch_on_gpus_says_which_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without LOCAL_RANK, Accelerate would take each process for a run of its own."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("grpo_dist.distributed.launch.computes_on_gpu", lambda: True)
    with pytest.raises(LaunchError, match="WORLD_SIZE=2 in the environment, but LOCAL_RANK not"):
        place_in_launch()


# --- GPUs -----------------------------------------------------------------------------------------------------------


def of_reports(reports: list[Report], rank: int = 0) -> Rendezvous:
    """A rendezvous whose ranks have come."""
    met = object.__new__(Rendezvous)
    met.rank, met.num_ranks, met.reports, met.place = rank, len(reports), reports, "10.0.0.1:29500"
    return met


def ranks_on(host: str, gpus: list[str], num_gpus: int) -> list[Report]:
    return [Report(host, "eth0 10.0.0.2", gpu, num_gpus) for gpu in gpus]


def test_more_ranks_than_gpus_are_refused() -> None:
    reports = [*ranks_on("a", ["u0", "u1"], 2), *ranks_on("b", ["v0", "v1", "v0", "v1"], 2)]
    for rank in range(6):
        message = r"4 ranks on b, which has 2 GPU\(s\) for them: rank 2, 4 would share one, .*--num_processes 4"
        with pytest.raises(LaunchError, match=message) as refusal:
            of_reports(reports, rank).check_gpus()
        assert not is_of_one_rank(refusal.value)


def test_ranks_that_each_see_one_gpu_may_be_several(caplog: pytest.LogCaptureFixture) -> None:
    """As srun --gpus-per-task gives them: all see a GPU 0, and they are different ones. None of them is idle."""
    of_reports(ranks_on("a", ["u0", "u1", "u2"], 1)).check_gpus()
    assert not caplog.records


def test_idle_gpus_are_said(caplog: pytest.LogCaptureFixture) -> None:
    reports = [*ranks_on("a", ["u0", "u1"], 8), *ranks_on("b", ["v0", "v1"], 2)]
    of_reports(reports, rank=1).check_gpus()
    assert not caplog.records
    of_reports(reports).check_gpus()
    assert [r.getMessage() for r in caplog.records] == [
        "6 of the 8 GPUs of a are idle: give `accelerate launch` --num_processes 10"]  # fmt: skip


def test_ranks_on_cpus_are_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    of_reports([Report("a", "lo 127.0.0.1", None, 0)] * 3).check_gpus()
    assert not caplog.records


class Card:
    """What torch says of a GPU."""

    def __init__(self, index: int) -> None:
        self.uuid = f"GPU-{index}"


def on_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Card)


def test_a_rank_takes_its_gpu_as_accelerate_does(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert rendezvous.own_report() == Report(socket.gethostname(), "lo 127.0.0.1", "GPU-1", 2)
    assert json.dumps(asdict(rendezvous.own_report()))


def test_ranks_that_are_to_use_the_cpu_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate_configs/cpu.yaml on a machine with GPUs."""
    on_gpus(monkeypatch, 2)
    assert resolve_dtype("auto") == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve_dtype("auto") == torch.float32
    assert rendezvous.own_report().gpu is None


def test_one_process_says_that_gpus_are_idle(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    on_gpus(monkeypatch, 1)
    warn_of_idle_gpus()
    assert not caplog.records
    on_gpus(monkeypatch, 8)
    warn_of_idle_gpus()
    assert "7 of this machine's 8 GPUs are idle" in caplog.text and "--num_processes 8" in caplog.text


# --- interfaces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "resolved", "preset", "chosen"),
    [(("a", "b"), "127.0.1.1", None, "eth0"), (("a", "b"), OSError("unknown host"), None, "eth0"),
     (("a", "b"), "10.0.0.2", None, None), (("a", "a"), "127.0.1.1", None, None),
     (("a", "b"), "127.0.1.1", "ib0", "ib0")],
)  # fmt: skip
def test_gloo_does_not_take_the_loopback_between_hosts(
    hosts: tuple[str, str], resolved: Any, preset: str | None, chosen: str | None,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def resolve(name: str) -> str:
        if isinstance(resolved, OSError):
            raise resolved
        return resolved

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    if preset:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", preset)
    else:  # so that what the code sets is taken back
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    of_reports([Report(host, "eth0 10.0.0.2", None, 0) for host in hosts]).choose_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen
    assert ("gloo takes eth0 10.0.0.2 instead" in caplog.text) == (chosen == "eth0")


@pytest.mark.parametrize(("ranks", "text"), [([], "none"), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0 to 2, 5, 7 to 8")])
def test_ranks_are_listed_in_runs(ranks: list[int], text: str) -> None:
    assert rendezvous._listed(ranks) == text
