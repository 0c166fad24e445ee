// Work that threads do together. Each begins with its own part; who is done with that takes pieces that others have not
// begun. So nobody waits long for a thread that another process, or memory, holds up.

#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "vectors.h"

namespace {

constexpr long PATIENCE = 1000; // looks at what others are to do, before the core is given away
enum { WORK, REDUCTION };       // kinds of work: a reduction is awaited amid other work
constexpr long HELPED = 7;      // others whose part a thread looks at: with many threads, looking at all would take longer

// What the threads have in common.
class Team {
    friend class Member;
    struct alignas(CACHE_LINE) Part { // of the newest work: its number, and the pieces from `first` to `last` nobody has
        std::atomic<uint64_t> left{0};
    };
    struct alignas(CACHE_LINE) Count {
        std::atomic<long> pieces{0};
    };
    const std::unique_ptr<Part[]> parts;
    Count done[2]; // of each kind of work

  public:
    explicit Team(long threads) : parts(new Part[threads]) {}
};

// A thread's part in the works of a team. All members ask for the same works in the same order.
class Member {
    static constexpr int NUMBER_AT = 48, FIRST_AT = 24; // bits of a part
    static constexpr uint64_t MOST_WORKS = 1 << (64 - NUMBER_AT);
    static constexpr uint64_t PIECE = (1 << FIRST_AT) - 1;
    Team& team;
    const long me = omp_get_thread_num(), threads = omp_get_num_threads();
    uint64_t number = 0; // of the newest work
    long due[2] = {0, 0}; // pieces of all works of a kind

    static uint64_t part(uint64_t number, uint64_t first, uint64_t last) {
        return number << NUMBER_AT | first << FIRST_AT | last;
    }

    long begin_of(long whose, long count) const { return count * whose / threads; }

    // A piece of a member's part, its first one or its last; -1 where nothing is left.
    long take(long whose, bool from_front, long count) {
        std::atomic<uint64_t>& left = team.parts[whose].left;
        for (uint64_t seen = left.load(std::memory_order_relaxed);;) {
            uint64_t now = seen;
            if (now >> NUMBER_AT < number) now = part(number, begin_of(whose, count), begin_of(whose + 1, count));
            const uint64_t first = now >> FIRST_AT & PIECE, last = now & PIECE;
            if (now >> NUMBER_AT > number || first == last) return -1;
            const uint64_t rest = from_front ? part(number, first + 1, last) : part(number, first, last - 1);
            if (left.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) return from_front ? first : last - 1;
        }
    }

  public:
    explicit Member(Team& team) : team(team) {}

    // whether it can tell the works of so many steps from one another, if each has as many as those so far
    bool can_count(long steps, long so_far) const { return number / so_far * steps < MOST_WORKS; }

    long thread() const { return me; }
    // the pieces of [0, count) that are this member's first of all
    long begin_of_mine(long count) const { return begin_of(me, count); }
    long end_of_mine(long count) const { return begin_of(me + 1, count); }

    // Does pieces of [0, count) until none is left. Others may then still be at theirs: what needs them awaits works of this
    // kind first.
    template <class Do> void share(long count, Do piece, int kind) {
        if (count == 0) return; // as for all
        ++number;
        due[kind] += count;
        long mine = 0;
        for (long of = 0; of < std::min(threads, 1 + HELPED); ++of)
            for (long n; (n = take((me + of) % threads, of == 0, count)) >= 0; ++mine) piece(n);
        if (mine) team.done[kind].pieces.fetch_add(mine, std::memory_order_release);
    }

    // until all pieces of all works of this kind are done
    void await(int kind) const {
        for (long looks = 0; team.done[kind].pieces.load(std::memory_order_acquire) < due[kind]; ++looks)
            if (looks > PATIENCE) std::this_thread::yield(); // who is awaited may need this core
    }
};

} // namespace
