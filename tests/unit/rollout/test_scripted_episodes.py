"""Episodes of an engine and an environment that follow a script: what is asked of whom, when, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.environments.host import Event
from grpo_dist.rollout import Request, Sampling, episodes
from grpo_dist.rollout.episodes import Episodes, Observation
from grpo_dist.text.call_formats import Call
from grpo_dist.text.tool_turns import Answer
from grpo_dist.types import Episode, Prompt, Trajectory

END, STOP = 1, 2
"""The tokens that end a turn: the model's own, and the last one of a stop text."""
LONGEST = 200
CALLS = {
    10: [Call("add", {"by": 1})],
    11: [Call("add", {"by": 2}), Call("", {}, "it is no JSON")],
    12: [Call("fly", {}), Call("add", {"by": "one"})],
    13: [],
}
"""The calls of a turn, by its first token."""


class Engine:
    """Gives the turns of a script, one entry a poll."""

    def __init__(self, turns: Sequence[Sequence[Trajectory]]) -> None:
        self.turns, self.asked = list(turns), list[list[Request]]()
        self.released: list[tuple[int, int]] = []

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        """Note what is asked for, of which there is something."""
        assert requests
        self.asked.append(list(requests))

    def poll(self) -> Sequence[Trajectory]:
        """The next turns."""
        return self.turns.pop(0)

    def release(self, rows: Sequence[tuple[int, int]]) -> None:
        """Note the rows."""
        self.released += rows


class Host:
    """Gives the events of a script, one entry a poll, and notes what it is asked for."""

    def __init__(self, script: Sequence[Sequence[Event]], with_users: Sequence[str] = (), reward: bool = False) -> None:
        self.script, self.with_users, self.has_reward, self.rewards = list(script), with_users, reward, ()
        self.asked: list[tuple[Any, ...]] = []
        self.waits: list[bool] = []
        self.ended: list[int] = []

    def name_of(self, row: Mapping[str, Any]) -> str:
        """The only environment."""
        return ""

    def tools(self, name: str) -> dict[str, dict[str, Any]]:
        """Two tools."""
        parameters = {"type": "object", "properties": {"by": {"type": "integer"}}, "required": ["by"]}
        return dict.fromkeys(["multiply", "add"], parameters)

    def reset(self, episode: int, row: Mapping[str, Any], seed: int) -> None:
        """Note a reset."""
        self.asked.append(("reset", episode, dict(row), seed))

    def call(self, episode: int, calls: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Note calls."""
        self.asked.append(("call", episode, list(calls)))

    def after_turn(self, episode: int, text: str) -> None:
        """Note what is said."""
        self.asked.append(("turn", episode, text))

    def reward(self, episode: int, row: Mapping[str, Any]) -> None:
        """Note that a reward is wanted."""
        self.asked.append(("reward", episode, dict(row)))

    def poll(self, seconds: float) -> Sequence[Event]:
        """The next events."""
        assert 0 <= seconds <= 0.5, "turns that end are not looked at in the meantime"
        self.waits.append(seconds > 0)
        return self.script.pop(0)

    def end(self, episode: int) -> None:
        """Note an end."""
        self.ended.append(episode)

    def end_all(self) -> None:
        """Nothing is left over."""


class Turns:
    """Renders answers as numbers."""

    def calls(self, text: str) -> list[Call]:
        """Those of the first token."""
        return CALLS[int(text.split()[0])]

    def answer_ids(self, answers: Sequence[Answer], is_open: bool) -> list[int]:
        """An end, where the turn has none, and as many tokens as texts have characters."""
        if any(each.text == "refused" for each in answers):
            raise ValueError("no such answer")
        return [END] * is_open + [20] * sum(len(each.text) for each in answers)

    def user_ids(self, messages: Sequence[Mapping[str, str]], is_open: bool) -> list[int]:
        """The same for what a user says."""
        return [END] * is_open + [30] * sum(len(each["content"]) for each in messages)


def made(host: Host, max_turns: int = 8, **options: Any) -> Episodes:
    """The episodes of an environment with tools."""

    def begun(prompt: Prompt, observation: Observation) -> Prompt:
        if observation == "too long":
            raise ValueError("it does not fit")
        return Prompt(
            prompt.index, [*prompt.ids, 9] if observation else prompt.ids, prompt.text, columns=prompt.columns
        )

    def texts_of(rows: Sequence[Sequence[int]]) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]

    config = EnvironmentConfig(**{"factory": "a:B", "max_turns": max_turns} | options)
    return Episodes(host, {"": Turns()}, config, LONGEST, texts_of, begun, [END])  # type: ignore[arg-type, dict-item]


def turn(sample: int, *ids: int, finished: bool = True) -> Trajectory:
    """A turn of a row."""
    return Trajectory(0, sample, list(ids), [-0.5] * len(ids), finished, [True] * len(ids))


def answers(episode: int, *texts: str, done: bool = False) -> Event:
    """What tools answer."""
    return Event(episode, "call", {"answers": [{"text": text, "outcome": "answered"} for text in texts], "done": done})


def request(sample: int) -> Request:
    """The first turn of a row."""
    return Request(0, sample, [7, 8], key=sample, prompt_key=77)


def resets(count: int) -> list[Event]:
    """What environments say that say nothing."""
    return [Event(number, "reset", {"observation": None}) for number in range(count)]


PROMPT = Prompt(5, [7, 8], "?", [{"role": "user", "content": "?"}], {"answer": "4"})


def test_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every kind of turn: calls that can be made, calls that cannot, words to a user, and the end."""
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0, 30.0, 38.0])
    monkeypatch.setattr(episodes, "time", SimpleNamespace(monotonic=clock.__next__))
    host = Host(
        [
            [Event(0, "reset", {"observation": "Go."})],
            [answers(0, "4")],
            [Event(0, "turn", {"messages": [{"role": "user", "content": "and?"}], "done": False})],
            [],
            [answers(0, "33")],
            [Event(0, "turn", {"messages": None, "done": True})],
            [Event(0, "reward", {"reward": 0.5, "rewards": {"own": 1.5}})],
        ],
        with_users=[""], reward=True,
    )  # fmt: skip
    engine = Engine([[turn(0, 10, END)], [turn(0, 13, STOP)], [turn(0, 12, END)], [turn(0, 11, STOP)],
                     [turn(0, 13, END)], []])  # fmt: skip
    (row,) = made(host).play(engine, [request(0)], [PROMPT], Sampling())  # type: ignore[arg-type]

    fly, no_json = "Error: there is no tool 'fly'; there are add, multiply", "Error: it is no JSON"
    one = 'Error: by is "one", expected an integer'
    runs = [[10, END], [20], [13, STOP], [END, *[30] * 4], [12, END], [20] * len(fly + one), [11, STOP],
            [END, *[20] * (2 + len(no_json))], [13, END]]  # fmt: skip
    assert row.ids == [token for run in runs for token in run]
    assert row.sampled == [number % 2 == 0 for number, run in enumerate(runs) for _ in run]
    assert row.logprobs == [-0.5] * 10 and row.finished and row.routes is None
    asked = [each for (each,) in engine.asked]
    before = [sum(map(len, runs[:count])) for count in range(0, len(runs), 2)]
    assert [each.prompt for each in asked] == [[7, 8, 9, *row.ids[:count]] for count in before]
    assert [each.offset for each in asked] == before and all(each.keeps for each in asked)
    assert [each.max_new_tokens for each in asked] == [None, *(LONGEST - count for count in before[1:])]

    def said(text: str, **calls: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": text, **calls}

    def called(name: str, **arguments: Any) -> dict[str, Any]:
        return {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}

    messages = [
        said("10 1", **called("add", by=1)), {"role": "tool", "name": "add", "content": "4"},
        said("13 2"), {"role": "user", "content": "and?"},
        said("12 1", tool_calls=[*called("fly")["tool_calls"], *called("add", by="one")["tool_calls"]]),
        {"role": "tool", "name": "fly", "content": fly}, {"role": "tool", "name": "add", "content": one},
        said("11 2", **called("add", by=2)), {"role": "tool", "name": "add", "content": "33"},
        {"role": "tool", "name": "unknown", "content": no_json}, said("13 1"),
    ]  # fmt: skip
    assert row.episode == Episode(
        messages, 5, 0.5, None, {"answered": 2, "error": 0, "malformed": 3},
        Prompt(5, [7, 8, 9], "?", columns={"answer": "4"}), {"own": 1.5}, tool_seconds=2 + 3 + 4 + 8,
    )  # fmt: skip
    assert host.asked == [
        ("reset", 0, {"answer": "4", "prompt": PROMPT.messages}, 77),
        ("call", 0, [("add", {"by": 1})]), ("turn", 0, "13 2"), ("call", 0, [("add", {"by": 2})]), ("turn", 0, "13 1"),
        ("reward", 0, {"answer": "4", "prompts": None, "completions": messages, "completion_ids": row.ids}),
    ]  # fmt: skip
    assert host.ended == [0] and set(engine.released) == {(0, 0)}
    assert host.waits == [True, True, True, False, True, True, True], "where it has nothing else to do"


def test_next_turns_are_handed_over_together() -> None:
    """Once they are a quarter of the rows that are sampled, or nobody is waited for: neither calls nor rewards."""
    script: list[tuple[list[Trajectory], list[Event], list[int]]] = [
        # turns that end, events, and the rows that are handed over then
        ([turn(0, 10, END), turn(1, 10, END)], [answers(0, "4")], []),  # 1 beside 6, while row 1 waits
        ([turn(2, 13, END)], [], []),  # beside 5
        ([turn(3, 13, END)], [], [0]),  # beside 4
        ([], [Event(2, "reward", {"reward": 0.0, "rewards": {}})], []),
        ([], [answers(1, "4")], []),  # beside 5, while the reward of row 3 is waited for
        ([], [Event(3, "reward", {"reward": 0.0, "rewards": {}})], [1]),
        ([turn(each, 13, END) for each in (0, 1, 4, 5, 6, 7)], [], []),
        ([], [Event(each, "reward", {"reward": 1.0, "rewards": {}}) for each in (7, 6, 5, 4, 1, 0)], []),
    ]
    host = Host([resets(8), *(events for _, events, _ in script)], reward=True)
    engine, handed_over = Engine([turns for turns, _, _ in script]), []

    def check() -> None:
        handed_over.append([each.sample for asked in engine.asked for each in asked])
        engine.asked.clear()

    rows = made(host).play(engine, [request(n) for n in range(8)], [PROMPT], Sampling(), check=check)  # type: ignore[arg-type]
    assert handed_over == [[], [*range(8), *script[0][2]], *(each for *_, each in script[1:])]
    assert [row.sample for row in rows] == list(range(8)) and all(row.finished for row in rows)
    assert host.waits == [True] + [False] * 6 + [True] * 2


@pytest.mark.parametrize(
    ("max_turns", "keeps", "texts", "finished", "ids"),
    [
        (1, [False], ["4"], False, [10, END]),
        (2, [True, False], ["4", "5"], False, [10, END, 20, 10, END]),
        (3, [True, True], ["4", "x" * LONGEST], False, [10, END, 20, 10, END]),
        (3, [True], ["x" * (LONGEST - 2)], False, [10, END]),
    ],
    ids=["one turn", "the last one", "no room later", "room for the answer alone"],
)
def test_an_episode_ends_at_its_limits(
    max_turns: int, keeps: list[bool], texts: list[str], finished: bool, ids: list[int]
) -> None:
    """The calls of the last turn are made, since they may end a game; what answers them is no part of the row."""
    host = Host([resets(1), *([answers(0, text)] for text in texts)])
    engine = Engine([[turn(0, 10, END)] for _ in texts])
    (row,) = made(host, max_turns).play(engine, [request(0)], [PROMPT], Sampling())  # type: ignore[arg-type]
    assert (row.ids, row.finished) == (ids, finished) and row.episode is not None
    assert [each.keeps for (each,) in engine.asked] == keeps
    assert row.episode.turns == len(texts) and row.episode.outcomes["answered"] == len(texts)
    assert row.episode.messages[-1] == {"role": "tool", "name": "add", "content": texts[-1]}


def test_the_calls_of_a_last_turn_that_can_end_nothing_are_not_made() -> None:
    host = Host([resets(1), []])
    engine = Engine([[turn(0, 10, END)]])
    (row,) = made(host, 1, factory=None, tools=["a:add"]).play(engine, [request(0)], [PROMPT], Sampling())  # type: ignore[arg-type]
    assert [kind for kind, *_ in host.asked] == ["reset"] and not row.finished


@pytest.mark.parametrize(
    ("begins", "event", "reason"),
    [
        ({"failure": "reset fails"}, None, "reset fails"),
        ({"observation": "too long"}, None, "it does not fit"),
        ({"observation": None}, answers(0, "refused"), "no such answer"),
        ({"observation": None}, Event(0, "call", {"failure": "call fails"}), "call fails"),
        ({"observation": None}, Event(0, "turn", {"failure": "it fails"}), "it fails"),
    ],
)
def test_an_episode_that_fails_has_no_reward(begins: dict[str, Any], event: Event | None, reason: str) -> None:
    """An episode that fails has no reward; one that cannot begin has one token."""
    host = Host([[Event(0, "reset", begins)], [event] if event else []], reward=True)
    engine = Engine([[turn(0, 10, END)]])
    (row,) = made(host).play(engine, [request(0)], [PROMPT], Sampling())  # type: ignore[arg-type]
    assert row.episode is not None and (row.episode.failure, row.finished) == (reason, False)
    assert row.episode.reward is None and row.episode.rewards == {} and row.ids == [10, END]
    assert [each.max_new_tokens for (each,) in engine.asked] == [None if event else 1]
    assert "reward" not in [kind for kind, *_ in host.asked] and host.ended == [0]


def test_first_prompts() -> None:
    """In the order of the rows, whichever begins first; a row whose reset fails is named."""
    prompts = [Prompt(index, [index], "?", columns={"answer": "4"}) for index in (4, 6)]
    host = Host([[Event(1, "reset", {"observation": "Go."})], [], [Event(0, "reset", {"observation": None})]])
    assert [each.ids for each in made(host).first_prompts(prompts)] == [[4], [6, 9]]
    assert [(episode, seed) for _, episode, _, seed in host.asked] == [(0, 0), (1, 1)] and not host.script
    for answer, reason in (({"failure": "no"}, "no"), ({"observation": "too long"}, "it does not fit")):
        with pytest.raises(ValueError, match=rf"reset fails on row 6, which has answer: {reason}"):
            made(Host([[Event(1, "reset", answer)]])).first_prompts(prompts)
    with pytest.raises(ValueError, match="row 4, which has no columns"):
        made(Host([[Event(0, "reset", {"failure": "no"})]])).first_prompts([Prompt(4, [4], "?")])
