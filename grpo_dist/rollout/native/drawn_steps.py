"""Steps of decoding with the draws between them, in one call of `decode.cpp`.

Of a small model a step takes less time than what Python does between two of them.

Shapes: R rows that are alive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .structures import DrawingFields, address_of

if TYPE_CHECKING:
    from .engine import Decoding
    from .kernel import KernelStep

MOST_STEPS = 32
"""Steps of a call, at most."""
SECONDS = 0.1
"""Time after which a call begins no other step: what has ended is then scored. Python is slow after a step, whose
weights have taken its place in the processor's caches."""
SECONDS_OF_TURNS = 0.02
"""The same where what has ended may be a turn, which somebody answers."""


class DrawnSteps:
    """The steps of one rollout of which nobody has to see each token."""

    def __init__(self, step: KernelStep, decoding: Decoding) -> None:
        self.decoding, self.step = decoding, step

    def __call__(self, most: int) -> tuple[int, int]:
        """At most so many tokens of every row that is alive. Returns the steps and the tokens of all rows."""
        decoding, state, steps = self.decoding, self.decoding.state, min(most, MOST_STEPS)
        state.make_room(steps)
        rows = decoding.alive.nonzero()[:, 0]
        count, num_rows, num_requests = len(rows), state.num_rows, len(decoding.requests)
        lengths, prompt = state.lengths[rows], state.prompt[rows]
        # never past the model's last position: by the largest one, some models choose the rotations of all
        own = (lengths[:, None] + torch.arange(steps)).clamp(max=decoding.engine.max_new_tokens - 1)
        positions = state.prompt_lengths[prompt][:, None] + own
        ends, table = decoding.rules.ends, decoding.tokens.shape
        seconds = SECONDS_OF_TURNS if decoding.has_turns else SECONDS
        drawing = DrawingFields(steps, table[1], seconds, 1 / decoding.sampling.temperature,
                                address_of(ends, ends.shape, torch.int64), len(ends))  # fmt: skip
        for shape, dtype, of in (
            ((num_rows,), torch.int64, {"request": decoding.row_request, "last": decoding.last,
                                        "lengths": state.lengths}),
            ((num_rows,), torch.bool, {"alive": decoding.alive}),
            ((num_requests,), torch.int64, {"keys": decoding.keys, "offsets": decoding.offset,
                                            "limits": decoding.limit, "ended_at": decoding.ended_at}),
            ((num_requests,), torch.bool, {"may_end": decoding.may_end}),
            (table, torch.int64, {"drawn": decoding.tokens}),
            (table, torch.float32, {"logprobs": decoding.logprobs}),
        ):  # fmt: skip
            for name, x in of.items():
                setattr(drawing, name, address_of(x, shape, dtype))
        self.step.run(
            decoding.last[rows], positions.flatten(), state.starts[rows] + lengths, rows, state,
            torch.empty(count, self.step.vocabulary), turns=steps * torch.arange(count), drawing=drawing,
        )  # fmt: skip
        state.count_all()
        return drawing.num_steps, drawing.num_drawn
