"""Where a reward function runs, which the function itself declares.

    @runs_in("gpu")
    class MyModelReward: ...

- `worker`: in the pool's shared worker processes, which get all completions of one prompt in a call. This is the
  default.
- `single`: in one worker process of its own on each rank, which gets all completions of the prompts that the rank
  scores, in one call unless `most_items` says otherwise: for clients that limit their concurrency.
- `gpu`: the same, and the process sees the rank's GPU and may use several threads.
- `main`: in a thread of the training process, for functions that need it. They cannot be killed there, so they have no
  time limit, and a crash ends the run.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, get_args

Placement = Literal["worker", "single", "gpu", "main"]
Declared = TypeVar("Declared")
_ATTRIBUTE, _MOST_ITEMS = "reward_placement", "reward_most_items"


def runs_in(placement: Placement, most_items: int | None = None) -> Any:
    """Decorate a reward function or class with the place where it runs. Raises ValueError for an unknown one.

    `most_items` is the most completions of one call, to which the time limit applies. Calls then have as many groups as
    fit, and a larger group is divided: use it for rewards that look at each completion by itself.
    """
    _check(placement)

    def declare(thing: Declared) -> Declared:
        setattr(thing, _ATTRIBUTE, placement)
        setattr(thing, _MOST_ITEMS, most_items)
        return thing

    return declare


def placement_of(thing: object) -> Placement:
    """Return where a function or class declares to run. Raises ValueError for an unknown place."""
    return _check(getattr(thing, _ATTRIBUTE, "worker"))


def most_items_of(thing: object) -> int | None:
    """Return the most completions of a call that a function or class declares; None where it declares none."""
    return getattr(thing, _MOST_ITEMS, None)


def _check(placement: Any) -> Placement:
    if placement not in get_args(Placement):
        raise ValueError(f"{_ATTRIBUTE}: {placement!r} given, expected one of {', '.join(get_args(Placement))}")
    return placement
