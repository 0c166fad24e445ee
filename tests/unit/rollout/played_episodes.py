"""Tools and a game for the toy model that calls tools, and its episodes with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from grpo_dist.algorithm.hashing import stream_key
from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.config.schema import Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, TrainConfig
from grpo_dist.data.prompts import render
from grpo_dist.environments.host import EnvironmentHost
from grpo_dist.model.config_files import end_token_ids, load_tokenizer
from grpo_dist.rollout import Decoder, LoadedModel, LocalEngine, NativeDecoder, Request, Sampling, awake
from grpo_dist.rollout.episodes import Episodes
from grpo_dist.rollout.playing import episodes_of, for_prompts, open_host
from grpo_dist.types import Prompt, Trajectory

TOOLS = """
import os, random, time

def calculator(expression: str) -> str:
    '''
    Work it out.

    Args:
        expression: What to work out.
    '''
    if expression.endswith("7"):
        time.sleep(0.2)
    left, right = map(int, expression.split("*"))
    if left % 10 == 3:
        raise ValueError("no threes")
    if left % 10 == 4:
        os._exit(1)
    return str(left * right)


class Guess:
    def reset(self, secret: int, note: str | None = None):
        self.secret, self.done = secret, False
        drawn = {"#": str(random.randrange(10**6)), "$": os.urandom(4).hex()}  # with the episode's seed, and without
        return note and "".join(drawn.get(letter, letter) for letter in note)

    def guess(self, number: int) -> str:
        '''
        Guess.

        Args:
            number: The guess.
        '''
        self.done = number == self.secret
        return "right" if self.done else "higher" if number < self.secret else "lower"

    def get_reward(self):
        return float(self.done)


def by_number(environments, prompts, completions, completion_ids, secret, **columns):
    (environment,), (messages,), (prompt,) = environments, completions, prompts
    assert environment.secret == secret[0] and prompt[-1]["role"] == "user" and completion_ids[0]
    return [sum(message["role"] == "assistant" for message in messages) + 0.5 * environment.done]


def by_half(environments, scale=1.0, **columns):
    return [scale / 2 if environment.done else None for environment in environments]


def twice(environments, **columns):
    return [1.0, 2.0]
"""
LONGEST = 96
MODEL = ModelConfig("toy-tools")
TOKENIZER = load_tokenizer(MODEL)
ENDS = end_token_ids(MODEL, TOKENIZER)
SIZE = 6


HOSTS: dict[str, EnvironmentHost] = {}


def host_of(config: Config) -> EnvironmentHost:
    """The host of a config. Those of equal environments share one: a process takes over a second to learn its tools."""
    assert config.environment is not None
    key = repr((replace(config.environment, max_turns=1), config.rewards))
    if key not in HOSTS:
        host = open_host(config)
        assert host is not None
        HOSTS[key] = host
    return HOSTS[key]


def make_config(*, longest: int = LONGEST, game: bool = False, **options: Any) -> Config:
    """A config of the calculator, or of the game."""
    given: dict[str, Any] = {"factory": "played:Guess"} if game else {"tools": ["played:calculator"]}
    return Config(
        model=MODEL, data=DataConfig(chat_template="always", max_prompt_length=40),
        rollout=RolloutConfig(max_completion_length=longest), train=TrainConfig(max_tokens_per_pack=4096),
        rewards=[RewardConfig("environment" if game else "math")],
        environment=EnvironmentConfig(**given | {"call_seconds": 20.0} | options),
    )  # fmt: skip


def make_prompts(config: Config, host: EnvironmentHost, rows: list[tuple[str, dict[str, Any]]]) -> list[Prompt]:
    """The prompts of rows: a question and the row's other columns."""
    prompts = []
    for index, (question, columns) in enumerate(rows):
        rendered = render([{"role": "user", "content": question}], config.data, for_prompts(TOKENIZER, host))
        prompts.append(Prompt(index, rendered.ids, rendered.text, rendered.messages, columns))
    return prompts


def make_requests(prompts: list[Prompt]) -> list[Request]:
    """All requests of a step."""
    return [Request(group, sample, prompt.ids, stream_key(5, group, sample), prompt_key=stream_key(5, group))
            for group, prompt in enumerate(prompts) for sample in range(SIZE)]  # fmt: skip


class Noting(LocalEngine):
    """An engine that notes which rows it need not keep."""

    def release(self, places: Iterable[tuple[int, int]]) -> None:
        self.released = getattr(self, "released", set()) | set(places)
        super().release(places)


def played(
    config: Config, rows: list[tuple[str, dict[str, Any]]], model: Any, decoder: Decoder | None = None,
    sampling: Sampling | None = None,
) -> tuple[list[Prompt], list[Trajectory]]:  # fmt: skip
    """The prompts, and the episodes of their groups."""
    host = host_of(config)
    prompts = make_prompts(config, host, rows)
    episodes = episodes_of(config, host, TOKENIZER, ENDS)
    assert isinstance(episodes, Episodes)
    longest = config.rollout.max_completion_length
    engine = Noting(decoder or NativeDecoder(ENDS, longest, 1 << 20), LoadedModel(model), {})
    finished: list[Trajectory] = []

    def note(ended: list[Trajectory]) -> None:
        assert not {each.group * SIZE + each.sample for each in ended} & host._home.keys(), "its environment is free"
        finished.extend(ended)

    with awake(engine):
        trajectories = episodes.play(engine, make_requests(prompts), prompts, sampling or Sampling(), note)
    assert engine.released == {(each.group, each.sample) for each in trajectories}
    assert sorted((t.group, t.sample) for t in finished) == [(t.group, t.sample) for t in trajectories]
    return prompts, trajectories


PRODUCTS = [(f"What is {left} * {right}?", {}) for left, right in ((12, 15), (21, 47), (68, 32), (43, 19), (55, 77))]
GAMES = [("Guess my number from 1 to 7.", {"secret": secret}) for secret in (2, 5, 7)]


def turns_of(trajectory: Trajectory) -> list[tuple[bool, list[int]]]:
    """The runs of tokens that were sampled, and that were not."""
    runs: list[tuple[bool, list[int]]] = []
    for token, sampled in zip(trajectory.ids, trajectory.sampled, strict=True):
        if not runs or runs[-1][0] != sampled:
            runs.append((sampled, []))
        runs[-1][1].append(token)
    return runs
