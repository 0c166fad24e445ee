"""Pieces of work that threads share: each is done once, before anybody goes on, whoever is late."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grpo_dist.model.compiled.library import library

PLAY = r"""
#include <chrono>
#include "work.h"

// `works` of 0, 1, ... pieces up to `most` and again; of each kind in turn, those of kind 1 awaited amid the next of
// kind 0. How often each piece (works, most) was done goes to `times`, and how many each thread did to `by`; the last
// thread begins `late` milliseconds late. Returns how many pieces saw an earlier one undone that they had awaited.
extern "C" int64_t play(int64_t threads, int64_t works, int64_t most, int64_t late, int64_t* times, int64_t* by) {
    Team team(threads);
    std::atomic<int64_t> faults{0};
#pragma omp parallel num_threads(threads)
    {
        Member member(team);
        if (member.thread() == threads - 1) std::this_thread::sleep_for(std::chrono::milliseconds(late));
        for (int64_t work = 0; work < works; ++work) {
            const int kind = work % 2;
            const int64_t count = work % (most + 1);
            auto whole = [&](int64_t of) {
                for (int64_t n = 0; n < of % (most + 1); ++n)
                    if (times[of * most + n] != 1) return false;
                return true;
            };
            if (kind == 1) member.await(0); // pieces of the work before may be what these read
            member.share(count, [&](int64_t n) {
                if (kind == 0 && work > 0) {
                    member.await(1);
                    if (!whole(work - 1)) ++faults;
                }
                if (kind == 1 && !whole(work - 1)) ++faults;
                ++times[work * most + n], ++by[member.thread()];
            }, kind);
        }
        member.await(0), member.await(1);
    }
    return faults;
}
"""
THREADS = [1, 2, 3, 8, 12]
"""Of twelve, each looks at some of the others alone."""


@pytest.fixture(name="play", scope="module")
def _play(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, torch.Tensor, torch.Tensor]]:
    source = tmp_path_factory.mktemp("work") / "play.cpp"
    source.write_text(PLAY, encoding="utf-8")
    code = library(Path(source))
    code.play.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_void_p] * 2
    code.play.restype = ctypes.c_int64

    def play(threads: int, works: int, most: int, late: int = 0) -> tuple[int, torch.Tensor, torch.Tensor]:
        times, by = torch.zeros(works, most, dtype=torch.int64), torch.zeros(threads, dtype=torch.int64)
        return code.play(threads, works, most, late, times.data_ptr(), by.data_ptr()), times, by

    return play


@pytest.mark.parametrize("threads", THREADS)
def test_each_piece_is_done_once_and_awaited(
    threads: int, play: Callable[..., tuple[int, torch.Tensor, torch.Tensor]]
) -> None:
    works, most = 3000, 7
    faults, times, _ = play(threads, works, most)
    expected = torch.arange(most) < (torch.arange(works) % (most + 1))[:, None]
    assert faults == 0
    torch.testing.assert_close(times, expected.long())


@pytest.mark.parametrize("threads", THREADS[1:])
def test_others_do_the_pieces_of_a_thread_that_is_late(
    threads: int, play: Callable[..., tuple[int, torch.Tensor, torch.Tensor]]
) -> None:
    faults, times, by = play(threads, works=41, most=40, late=300)
    assert faults == 0
    assert int(times.sum()) == sum(range(41))
    assert int(by[-1]) < int(times.sum()) // threads // 2, "it found its own part done"
