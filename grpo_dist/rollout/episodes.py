"""Episodes: turns of the policy, and between them what tools and environments answer.

Rows do not wait for each other's tools: while one waits, the engine samples the others. The ids of a trajectory are
those the engine sampled, and between turns those that the chat template adds; nothing is decoded and encoded again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config.environment import EnvironmentConfig
from ..environments.arguments import misfit
from ..environments.host import EnvironmentHost, Event
from ..text.call_formats import Call
from ..text.tool_turns import Answer, ToolTurns
from ..types import Episode, Prompt, Trajectory
from .engine import Engine, Request, in_order
from .sampling import Sampling

_WAIT_SECONDS = 0.05
_SHARE_AT_ONCE = 0.25
"""Next turns are handed to the engine when they are this share of those it samples: it computes many rows as fast as a
few."""

Finish = Callable[[list[Trajectory]], None]
Observation = str | list[dict[str, str]] | None
"""What an environment says at its reset: a text, messages, or nothing."""


@dataclass
class _Play:
    """An episode under way."""

    number: int
    request: Request
    """Of its first turn."""
    prompt: Prompt
    environment: str
    """Its name."""
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: Tensor | None = None
    """Of the prompt and `ids`; of a token that several turns computed, the first ones."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    """Of its newest turn."""
    turns: int = 0
    is_open: bool = False
    """Whether its newest turn ended without an end token, by a stop text."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("answered", "error", "malformed"), 0))
    finished: bool = False
    failure: str | None = None
    reward: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    tool_seconds: float = 0.0
    asked_at: float = 0.0
    """When its newest calls were made, or its newest turn was handed over."""


class Episodes:
    """Plays the episodes of a rank."""

    def __init__(
        self, host: EnvironmentHost, turns: Mapping[str, ToolTurns], config: EnvironmentConfig, longest: int,
        texts_of: Callable[[Sequence[Sequence[int]]], list[str]], begun: Callable[[Prompt, Observation], Prompt],
        end_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """`turns` are by the environments' names, `longest` is the most tokens after a prompt; `end_ids` end a turn;
        `begun` is a prompt with what an environment said at its reset, and raises ValueError where that does not
        fit."""
        self.host, self._turns, self._config, self._longest = host, turns, config, longest
        self._texts_of, self._begun, self._end_ids = texts_of, begun, end_ids

    def play(
        self, engine: Engine, requests: list[Request], prompts: Sequence[Prompt], sampling: Sampling,
        on_finish: Finish | None = None, check: Callable[[], None] | None = None,
    ) -> list[Trajectory]:  # fmt: skip
        """One trajectory a request of an engine that is awake, in the order of the requests; see `engine.sample`.

        Raises ValueError where the episodes of one prompt begin differently.
        """
        table = _Table(self, engine, sampling, on_finish)
        try:
            return table.play(requests, prompts, check)
        finally:
            self.host.end_all()

    def first_prompts(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with what their environments say at a reset; no episode follows it.

        Raises ValueError with the row whose reset fails, or says what does not fit.
        """
        begun: dict[int, Prompt] = {}
        try:
            for number, prompt in enumerate(prompts):
                self.reset(number, prompt, seed=number)
            while len(begun) < len(prompts):
                for event in self.host.poll(_WAIT_SECONDS):
                    begun[event.episode] = self._first_prompt(prompts[event.episode], event.answer)
        finally:
            self.host.end_all()
        return [begun[number] for number in range(len(prompts))]

    def _first_prompt(self, prompt: Prompt, answer: dict[str, Any]) -> Prompt:
        try:
            if failure := answer.get("failure"):
                raise ValueError(failure)
            return self._begun(prompt, answer["observation"])
        except ValueError as error:
            columns = ", ".join(prompt.columns) or "no columns"
            raise ValueError(f"environment.factory: reset fails on row {prompt.index}, which has {columns}: {error}"
                             ) from error  # fmt: skip

    def reset(self, number: int, prompt: Prompt, seed: int) -> None:
        """Begin an episode on a prompt; what its environment draws follows from `seed`."""
        self.host.reset(number, {**prompt.columns, "prompt": prompt.messages}, seed)

    def begin(self, play: _Play, observation: Observation) -> None:
        """Take in what an environment said at its reset. Raises ValueError where there is no prompt."""
        play.prompt = self._begun(play.prompt, observation)
        play.request = replace(play.request, prompt=play.prompt.ids)

    def read(self, play: _Play, turn: Trajectory) -> None:
        """Take in a turn, and the calls in it."""
        play.routes = routes_after(play.routes, turn.routes)
        play.ids += turn.ids
        play.sampled += turn.sampled
        play.logprobs += turn.logprobs
        play.turns += 1
        play.is_open = turn.finished and turn.ids[-1] not in self._end_ids
        (text,) = self._texts_of([turn.ids])
        play.calls = self._turns[play.environment].calls(text) if turn.finished else []
        calls = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                 for call in play.calls if call.problem is None]  # fmt: skip
        play.messages.append({"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {}))

    def possible(self, play: _Play) -> list[tuple[str, dict[str, Any]]]:
        """The calls of the newest turn that can be made."""
        return [(call.name, call.arguments) for call in play.calls if self._problem(play, call) is None]

    def answered(self, play: _Play, answers: Sequence[dict[str, str]]) -> list[int]:
        """Take in the answers of the possible calls; returns the token ids that all the turn's answers add."""
        given = iter(answers)
        texts: list[Answer] = []
        for call in play.calls:
            problem = self._problem(play, call)
            answer = next(given) if problem is None else {"text": f"Error: {problem}", "outcome": "malformed"}
            play.counts[answer["outcome"]] += 1
            texts.append(Answer(call.name or "unknown", answer["text"]))
        play.messages += [{"role": "tool", "name": each.name, "content": each.text} for each in texts]
        return self._turns[play.environment].answer_ids(texts, is_open=play.is_open)

    def replied(self, play: _Play, messages: Sequence[dict[str, str]]) -> list[int]:
        """Take in what the environment answered to a turn without calls; returns the token ids that it adds."""
        play.messages += messages
        return self._turns[play.environment].user_ids(messages, is_open=play.is_open) if messages else []

    @property
    def has_environment(self) -> bool:
        """Whether calls may change something, rather than only say something."""
        return bool(self._config.factories)

    def turns_left(self, turns: int) -> int:
        """Turns that an episode may have after so many."""
        return self._config.max_turns - turns

    def stops(self, play: _Play) -> bool:
        """Whether the newest turn has called a tool that ends the episode."""
        return any(name in self._config.stop_tools for name, _ in self.possible(play))

    def room(self, play: _Play, added: int) -> int:
        """Tokens that the trajectory may still get after so many more."""
        return self._longest - len(play.ids) - added

    def _problem(self, play: _Play, call: Call) -> str | None:
        if call.problem is not None:
            return call.problem
        if call.name not in (tools := self.host.tools(play.environment)):
            return f"there is no tool {call.name!r}; there are {', '.join(sorted(tools))}"
        return misfit(call.arguments, tools[call.name])


class _Table:
    """The episodes of one call of `play`."""

    def __init__(self, episodes: Episodes, engine: Engine, sampling: Sampling, on_finish: Finish | None) -> None:
        self.episodes, self.host, self.engine, self.sampling = episodes, episodes.host, engine, sampling
        self.on_finish = on_finish
        self.by_number: dict[int, _Play] = {}
        self.by_place: dict[tuple[int, int], _Play] = {}
        self.sampling_now: set[tuple[int, int]] = set()
        self.next_turns: list[Request] = []
        self.calls = 0  # that episodes wait for
        self.done: list[Trajectory] = []

    def play(
        self, requests: list[Request], prompts: Sequence[Prompt], check: Callable[[], None] | None
    ) -> list[Trajectory]:
        for number, request in enumerate(requests):
            request = replace(request, keeps=self.episodes.turns_left(0) > 1)
            prompt = prompts[request.group]
            play = _Play(number, request, prompt, self.host.name_of(prompt.columns))
            self.by_number[number] = self.by_place[request.group, request.sample] = play
            self.episodes.reset(number, prompt, request.prompt_key)
        waiting = len(requests)
        while waiting:  # the first turns of a group share their prompt only if they come at once
            for event in self.host.poll(_WAIT_SECONDS):
                waiting -= 1
                self._begin(self.by_number[event.episode], event)
            if check:
                check()
        self._require_one_beginning()
        self._submit([play.request for play in self.by_number.values()])
        while len(self.done) < len(requests):
            for turn in self.engine.poll():
                self.sampling_now.discard((turn.group, turn.sample))
                self._turn(self.by_place[turn.group, turn.sample], turn)
            for event in self.host.poll(0.0 if self.sampling_now or self.next_turns else _WAIT_SECONDS):
                self.calls -= 1
                self._event(self.by_number[event.episode], event)
            enough = not self.calls or len(self.next_turns) >= _SHARE_AT_ONCE * len(self.sampling_now)
            if self.next_turns and enough:
                self._submit(self.next_turns)
                self.next_turns = []
            if check:
                check()
        return in_order(requests, self.done)

    def _begin(self, play: _Play, event: Event) -> None:
        play.failure = event.answer.get("failure")
        if play.failure is None:
            try:
                self.episodes.begin(play, event.answer["observation"])
            except ValueError as error:
                play.failure = str(error)
        if play.failure is not None:  # a row has at least one token
            play.request = replace(play.request, max_new_tokens=1)

    def _require_one_beginning(self) -> None:
        first: dict[int, _Play] = {}
        for play in self.by_number.values():
            if play.failure is None:
                require_same(first.setdefault(play.request.group, play).prompt, play.prompt)

    def _submit(self, requests: list[Request]) -> None:
        self.sampling_now |= {(request.group, request.sample) for request in requests}
        self.engine.submit(requests, self.sampling)

    def _turn(self, play: _Play, turn: Trajectory) -> None:
        self.episodes.read(play, turn)
        if play.failure is not None or not turn.finished:
            self._conclude(play, finished=False)
        elif not play.calls and play.environment in self.host.with_users:
            self._wait(play)
            self.host.after_turn(play.number, play.messages[-1]["content"])
        elif not play.calls:
            self._conclude(play, finished=True)
        elif not self.episodes.turns_left(play.turns) and not self.episodes.has_environment:
            self._conclude(play, finished=False)
        elif calls := self.episodes.possible(play):  # of the last turn too: a move may end the game
            self._wait(play)
            self.host.call(play.number, calls)
        else:
            self._go_on(play, partial(self.episodes.answered, play, []))

    def _wait(self, play: _Play) -> None:
        self.calls += 1
        play.asked_at = time.monotonic()

    def _event(self, play: _Play, event: Event) -> None:
        play.failure = event.answer.get("failure")
        if event.kind in ("call", "turn"):
            play.tool_seconds += time.monotonic() - play.asked_at
        if play.failure is not None:
            self._finish(play)
        elif event.kind == "call":
            ended = event.answer["done"] or self.episodes.stops(play)
            self._go_on(play, partial(self.episodes.answered, play, event.answer["answers"]), ended)
        elif event.kind == "turn":
            self._go_on(
                play, partial(self.episodes.replied, play, event.answer["messages"] or []), event.answer["done"]
            )
        else:
            play.reward, play.rewards = event.answer["reward"], event.answer["rewards"]
            self._finish(play)

    def _go_on(self, play: _Play, answer_ids: Callable[[], list[int]], ended: bool = False) -> None:
        """The next turn, after what answers the newest one; none where the episode has `ended`."""
        try:
            ids = answer_ids()
        except ValueError as error:  # the template refuses what a tool answered
            play.failure = str(error)
            self._finish(play)
            return
        if ended:
            self._conclude(play, finished=True)
        elif not self.episodes.turns_left(play.turns) or (room := self.episodes.room(play, len(ids))) < 1:
            self._conclude(play, finished=False)
        else:
            play.ids += ids
            play.sampled += [False] * len(ids)
            row = [*play.prompt.ids, *play.ids]
            self.next_turns.append(replace(play.request, prompt=row, max_new_tokens=room, offset=len(play.ids),
                                           keeps=self.episodes.turns_left(play.turns) > 1))  # fmt: skip

    def _conclude(self, play: _Play, finished: bool) -> None:
        play.finished = finished
        self.engine.release([(play.request.group, play.request.sample)])
        if (self.host.has_reward or self.host.rewards) and play.failure is None:
            self.calls += 1
            row = {"prompts": play.prompt.messages, "completions": play.messages, "completion_ids": play.ids}
            self.host.reward(play.number, play.prompt.columns | row)
        else:
            self._finish(play)

    def _finish(self, play: _Play) -> None:
        self.host.end(play.number)
        self.engine.release([(play.request.group, play.request.sample)])
        episode = Episode(play.messages, play.turns, play.reward, play.failure, play.counts, play.prompt,
                          play.rewards, play.tool_seconds)  # fmt: skip
        request = play.request
        self.done.append(Trajectory(request.group, request.sample, play.ids, play.logprobs, play.finished, play.sampled,
                                    episode, play.routes))  # fmt: skip
        if self.on_finish:
            self.on_finish(self.done[-1:])


def routes_after(before: Tensor | None, turn: Tensor | None) -> Tensor | None:
    """The routes of a row after one more turn, (T, J, K). `turn` has those of the tokens of `before` too, as they were
    computed again; what was drawn after them was drawn by the first ones, except for the last token, which had none."""
    return turn if before is None or turn is None else torch.cat([before[:-1], turn[len(before) - 1 :]])


def require_same(one: Prompt, other: Prompt) -> None:
    """Raise ValueError unless two episodes of a row of the data begin with the same tokens."""
    if one.ids != other.ids:
        raise ValueError(
            f"environment.factory: reset began two episodes of row {one.index} with different texts ({one.text!r:.200} "
            f"and {other.text!r:.200}). A group has to play the same game: take what is random from the row's columns, "
            "from Python's `random`, or from the argument `seed` of reset"
        )
