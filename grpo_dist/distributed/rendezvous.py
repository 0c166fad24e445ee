"""How the ranks of a run find one another, and the messages where one is missing.

Every rank reports to the store of the launch where it runs and which GPU it takes, before it enters any collective.
Until all have reported, rank 0 names the missing ones now and then. The first collective then has a time limit of its
own: a wrong network interface shows there, and would otherwise be a wait of hours. Needs no process group.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from ..text.plain import write_lines
from .device import computes_on_gpu
from .launch import LaunchError, place_in_launch

log = logging.getLogger(__name__)

START_SECONDS = 600.0
"""How long ranks wait for one another until the run has started."""
FIRST_COLLECTIVE_SECONDS = 180.0
"""How long the first collective may take once all ranks have reported."""
REMIND_SECONDS = 30.0
"""Missing ranks are named this often."""
LOOK_SECONDS = 0.2
FAILURE_SECONDS = 5.0
"""How long a rank that has failed waits until the others know. Once it has ended, its launcher ends the others."""
LATE_SECONDS = 60.0
"""The same where the others may not have reported yet."""


@dataclass(frozen=True)
class Report:
    """What a rank reports when it starts."""

    host: str
    address: str
    """The interface and address from which it reaches the first rank."""
    gpu: str | None
    """The id of its GPU on the host; None on a CPU."""
    num_gpus: int
    """GPUs that it sees."""


class Rendezvous:
    """The ranks of a launch, seen from one of them."""

    reports: list[Report]
    """Of all ranks in order, once they have met."""

    def __init__(self, rank: int, num_ranks: int, timeout_seconds: float = START_SECONDS) -> None:
        """Reach the store of the launch. Raises LaunchError where it does not answer in time."""
        self.rank, self.num_ranks, self.timeout_seconds = rank, num_ranks, timeout_seconds
        self.place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.store = self._store()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        start = self.store.add(f"grpo_dist/{attempt}/{rank}", 1)  # a store may outlive a run
        self._prefix = f"grpo_dist/{attempt}/{start}"

    @classmethod
    def meet(cls, rank: int, num_ranks: int, timeout_seconds: float = START_SECONDS) -> Rendezvous:
        """Report, and wait for the others. Raises LaunchError where they do not report in time."""
        met = cls(rank, num_ranks, timeout_seconds)
        arrival = f"reported to {met.place}"
        met.wait_at(arrival, timeout_seconds, json.dumps(asdict(own_report())))
        reports = met.store.multi_get([met._key(arrival, each) for each in range(num_ranks)])
        met.reports = [Report(**json.loads(each)) for each in reports]
        return met

    @classmethod
    def fail_before(cls, error: Exception) -> None:
        """End the other ranks, also those that start later, with the error that ended this one before its report.

        Rank 0 prints its own error. Raises LaunchError where rank 0 does not learn of it, so that this rank prints it.
        """
        rank, num_ranks = place_in_launch()
        if rank == 0:
            return
        with suppress(LaunchError, RuntimeError):  # torch raises RuntimeError where the store ends meanwhile
            if cls(rank, num_ranks, LATE_SECONDS).fail(error, LATE_SECONDS):
                return
        raise LaunchError(f"rank {rank} on {socket.gethostname()}: {error}") from error

    def _store(self) -> dist.Store:
        """The launcher's store, or else one that rank 0 serves."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        begun = reminded = time.monotonic()
        while not serves and not _answers(host, port):
            now = time.monotonic()
            if now - begun > self.timeout_seconds:
                raise LaunchError(f"rank {self.rank} on {socket.gethostname()} has had no answer from {self.place} "
                                  f"for {now - begun:.0f} s: check that rank 0 runs there, and that the port is "
                                  "open")  # fmt: skip
            if now - reminded > REMIND_SECONDS:
                log.error("rank %d on %s has no answer from %s yet (%.0f s of %.0f)", self.rank, socket.gethostname(),
                          self.place, now - begun, self.timeout_seconds)  # fmt: skip
                reminded = now
            time.sleep(LOOK_SECONDS)
        # torch's own rendezvous follows at the same address and shares the store; a wait for all ranks is not for here
        return dist.TCPStore(host, port, self.num_ranks, serves, timedelta(seconds=self.timeout_seconds),
                             wait_for_workers=False, multi_tenant=True)  # fmt: skip

    def _key(self, *parts: str | int) -> str:
        return "/".join(map(str, (self._prefix, *parts)))

    def _set(self, point: str, value: str = "") -> None:
        self.store.set(self._key(point, self.rank), value)
        self.store.add(self._key(point), 1)

    def missing(self, point: str) -> list[int]:
        """Ranks that have not passed a point."""
        return [each for each in range(self.num_ranks) if not self.store.check([self._key(point, each)])]

    def wait_at(self, point: str, timeout_seconds: float, value: str = "") -> None:
        """Pass a point, and wait until all ranks have passed it; the log names those that have not. Raises LaunchError,
        also where one of them has failed."""
        try:
            self._set(point, value)
            begun = reminded = time.monotonic()
            while self.store.add(self._key(point), 0) < self.num_ranks:
                if self.store.check([self._key("failed")]):
                    self.store.add(self._key("know"), 1)
                    raise LaunchError(self.store.get(self._key("failed")).decode())
                now = time.monotonic()
                if now - begun > timeout_seconds:
                    raise LaunchError(f"{self._missing_since(point, now - begun)}. Start them with the same address "
                                      "and port, or start fewer ranks; their own logs say why they have not"
                                      )  # fmt: skip
                if now - reminded > REMIND_SECONDS and (self.rank == 0 or 0 in self.missing(point)):
                    log.error(
                        "%s (the run ends after %.0f s)", self._missing_since(point, now - begun), timeout_seconds
                    )
                    reminded = now
                time.sleep(LOOK_SECONDS)
        except RuntimeError as error:
            raise LaunchError(f"rank {self.rank} on {socket.gethostname()}: {self.place} does not answer any more; "
                              "rank 0, or its launcher, has ended: see its log") from error  # fmt: skip

    def _missing_since(self, point: str, seconds: float) -> str:
        missing = self.missing(point)
        return (f"{self.num_ranks - len(missing)} of {self.num_ranks} ranks have {point}; missing for {seconds:.0f} s: "
                f"rank {_listed(missing)}")  # fmt: skip

    def fail(self, error: Exception, seconds: float = FAILURE_SECONDS) -> bool:
        """End the ranks that wait for this one, with its error; returns whether all know within `seconds`."""
        message = f"rank {self.rank} on {socket.gethostname()} has failed: {type(error).__name__}: {error}"
        with suppress(RuntimeError):  # the store ended with rank 0
            self.store.set(self._key("failed"), message)
            know, begun = self.store.add(self._key("know"), 1), time.monotonic()
            while know < self.num_ranks and time.monotonic() - begun < seconds:
                time.sleep(LOOK_SECONDS)
                know = self.store.add(self._key("know"), 0)
            return know >= self.num_ranks
        return False

    @contextmanager
    def first_collective(self, timeout_seconds: float = FIRST_COLLECTIVE_SECONDS) -> Iterator[None]:
        """Inside, all ranks enter their first collective; the process ends where that takes too long.

        A thread prints the error and ends the process: no exception ends a call of NCCL or gloo. Raises LaunchError
        where the collective fails.
        """
        self._set("entered")
        timer = threading.Timer(timeout_seconds, self._give_up, [timeout_seconds])
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:
            raise LaunchError(f"{self._advice()}\n{str(error).splitlines()[0]}") from error
        finally:
            timer.cancel()
        self._set("done")

    def _give_up(self, seconds: float) -> None:
        try:
            advice = self._advice()
        except RuntimeError:
            advice = f"rank {self.rank} on {self.reports[self.rank].host}: {self.place} does not answer any more either"
        write_lines(f"error: no answer in {seconds:.0f} s. {advice}", sys.stderr)
        time.sleep(2.0)  # the others print theirs too, and the store may be in this process
        os._exit(1)

    def _advice(self) -> str:
        own, absent, not_done = self.reports[self.rank], self.missing("entered"), self.missing("done")
        inside = [each for each in not_done if each not in absent]
        done = [each for each in range(self.num_ranks) if each not in not_done]
        backend, name = ("NCCL", "NCCL_SOCKET_IFNAME") if own.gpu else ("gloo", "GLOO_SOCKET_IFNAME")
        hosts = {each.host: each.address for each in self.reports}
        return (
            f"rank {self.rank} on {own.host} does not complete the first collective of the {self.num_ranks} ranks "
            f"over {backend} ({name}={os.environ.get(name, '(not set)')}; it reaches {self.place} by {own.address}). "
            f"Ranks that have completed it: {_listed(done)}; inside: {_listed(inside)}; missing: {_listed(absent)}. "
            f"Hosts: {', '.join(f'{host} ({address})' for host, address in hosts.items())}. Set NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME to the interface by which the hosts reach one another"
        )

    def check_gpus(self) -> None:
        """Raise LaunchError on all ranks where two share a GPU; rank 0 warns of GPUs that no rank takes."""
        takers: dict[tuple[str, str], list[int]] = {}
        for rank, report in enumerate(self.reports):
            if report.gpu is not None:
                takers.setdefault((report.host, report.gpu), []).append(rank)
        if not takers:
            return
        for (host, _), ranks in takers.items():
            if len(ranks) > 1:
                there, seen = self._on(host)
                raise LaunchError(f"{there} ranks on {host}, which has {seen} GPU(s) for them: rank {_listed(ranks)} "
                                  "would share one, which NCCL refuses. Give `accelerate launch` --num_processes "
                                  f"{self.num_ranks - there + seen}", by_all=True)  # fmt: skip
        for host in dict.fromkeys(host for host, _ in takers):
            there, seen = self._on(host)
            if self.rank == 0 and seen > there:
                log.warning("%d of the %d GPUs of %s are idle: give `accelerate launch` --num_processes %d",
                            seen - there, seen, host, self.num_ranks - there + seen)  # fmt: skip

    def _on(self, host: str) -> tuple[int, int]:
        """The number of ranks on a host, and of GPUs that they see there."""
        there = [report for report in self.reports if report.host == host]
        cards = {report.gpu for report in there}
        return len(there), max(len(cards), max(report.num_gpus for report in there))

    def choose_interface(self) -> None:
        """Choose gloo's interface where gloo would take one that no other host reaches.

        Gloo looks up the host's own name, which many systems resolve to 127.0.1.1.
        """
        own = self.reports[self.rank]
        if len(Counter(report.host for report in self.reports)) == 1 or "GLOO_SOCKET_IFNAME" in os.environ:
            return
        try:
            address = socket.gethostbyname(own.host)
        except OSError as error:
            address = f"nothing ({error})"
        if address.startswith(("127.", "nothing")):
            interface = own.address.partition(" ")[0]
            log.error("rank %d: the name %s resolves to %s, where no other host reaches it; gloo takes %s instead, by "
                      "which this host reaches %s (set GLOO_SOCKET_IFNAME for another)", self.rank, own.host, address,
                      own.address, self.place)  # fmt: skip
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def own_report() -> Report:
    """This rank's report; its GPU is the one that Accelerate will choose."""
    gpu, num_gpus = None, 0
    if computes_on_gpu():
        num_gpus = torch.cuda.device_count()
        index = int(os.environ.get("LOCAL_RANK", "0")) % num_gpus
        named = getattr(torch.cuda.get_device_properties(index), "uuid", None)  # ranks may see different GPUs as 0
        gpu = str(named or f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')}/{index}")
    return Report(socket.gethostname(), _address_towards(os.environ["MASTER_ADDR"]), gpu, num_gpus)


def warn_of_idle_gpus() -> None:
    """Warn where one process without a launcher leaves GPUs idle."""
    if computes_on_gpu() and (count := torch.cuda.device_count()) > 1:
        log.warning("%d of this machine's %d GPUs are idle: `accelerate launch --config_file "
                    "accelerate_configs/zero2.yaml --num_processes %d -m grpo_dist.train …` takes all",
                    count - 1, count, count)  # fmt: skip


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False


def _address_towards(host: str) -> str:
    """The interface and address from which packets to a host leave, as `eth0 10.0.0.2`."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address = probe.getsockname()[0]
    except OSError as error:
        return f"unknown ({error})"
    names = (name for name, known in psutil.net_if_addrs().items() if address in {each.address for each in known})
    return f"{next(names, 'unknown')} {address}"


def _listed(ranks: list[int]) -> str:
    """Ranks in one line, with long runs shortened."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return "none" if not runs else ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
