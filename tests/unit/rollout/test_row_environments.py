"""Several environments of which the data chooses one a row, prompts that environments give, and what they draw."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from modules_on_disk import importable
from transformers import AutoModelForCausalLM

from grpo_dist.config.environment import EnvironmentConfig
from grpo_dist.config.schema import Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, TrainConfig
from grpo_dist.data.mixture import load_training
from grpo_dist.data.prompts import PromptReader
from grpo_dist.environments.host import EnvironmentHost
from grpo_dist.model.config_files import end_token_ids, load_tokenizer
from grpo_dist.model.toy import toy_path
from grpo_dist.rollout import LoadedModel, LocalEngine, RowDecoder, Sampling, awake
from grpo_dist.rollout.playing import described, episodes_of, for_prompts, open_host, prompt_reader, with_observation
from grpo_dist.trainer.scoring import requests_of
from grpo_dist.types import Episode, Trajectory

MODULE = '''
import random
from random import randint


class Products:
    def reset(self, **row):
        assert "environment" not in row and "seed" not in row
        left, right = random.randint(11, 99), randint(11, 99)
        self.product, self.answer = left * right, None
        return f"What is {left} * {right}?"

    def calculator(self, expression: str) -> str:
        """Work it out.

        Args:
            expression: What to work out.
        """
        left, right = map(int, expression.split("*"))
        self.answer = left * right
        return str(self.answer)

    def get_reward(self):
        return float(self.answer == self.product)


class Game:
    def reset(self, seed, hint=None, **row):
        self.secret, self.done = random.Random(seed).randint(1, 7), False
        return None if hint == "none" else [{"role": "user", "content": "Guess my number from 1 to 7."}]

    def guess(self, number: int) -> str:
        """Guess.

        Args:
            number: The guess.
        """
        self.done = number == self.secret
        return "right" if self.done else "higher" if number < self.secret else "lower"


class Dice:
    def reset(self):
        self.first = random.gauss(0, 1)

    def roll(self) -> list[float]:
        """Roll."""
        later = [random.random(), random.gauss(0, 1), random.choice(range(1000)), *random.sample(range(99), 3)]
        return [self.first, *later]

    async def roll_later(self) -> int:
        """Roll after a while."""
        return random.getrandbits(40)


class Examiner:
    def reset(self, **row):
        self.said = []
        return "What is 12 * 15?"

    def after_turn(self, text):
        self.said.append(text)
        return f"No, <|endoftext|>{len(self.said)}." if len(self.said) < 3 else None

    def get_reward(self):
        return float(len(self.said))


def roll_alone() -> float:
    """Roll."""
    return random.random()


def by_kind(environments, completions, **columns):
    return [float(type(each).__name__ == "Game") for each in environments]
'''
MODEL = ModelConfig("toy-tools")
TOKENIZER = load_tokenizer(MODEL)
SIZE = 4


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with importable(tmp_path_factory, "arcade", MODULE):
        yield


def make_config(path: Path, rows: list[dict[str, Any]], **options: Any) -> Config:
    """A config of both environments."""
    path.write_text("\n".join(map(json.dumps, rows)))
    given = {"factory": {"products": "arcade:Products", "game": "arcade:Game"}, "max_turns": 3, "workers": 1} | options
    return Config(
        model=MODEL, rollout=RolloutConfig(max_completion_length=64), train=TrainConfig(max_tokens_per_pack=4096),
        data=DataConfig(str(path), None, prompt_column=None, answer_column=None, chat_template="always",
                        max_prompt_length=40),
        rewards=[RewardConfig("environment"), RewardConfig("arcade:by_kind")], environment=EnvironmentConfig(**given),
    )  # fmt: skip


def played(config: Config, stream: str = "train/0") -> list[Trajectory]:
    """Groups of episodes on all rows."""
    host = open_host(config)
    assert host is not None
    with host:
        prompts, _ = load_training(prompt_reader(config, TOKENIZER, host), config.train)
        ends = end_token_ids(MODEL, TOKENIZER)
        episodes = episodes_of(config, host, TOKENIZER, ends)
        assert episodes is not None
        model = AutoModelForCausalLM.from_pretrained(toy_path("toy-tools"), dtype="float32").eval()
        engine = LocalEngine(RowDecoder(ends, config.rollout.max_completion_length), LoadedModel(model), {})
        requests = requests_of(list(prompts), SIZE, slice(0, SIZE * len(prompts)), 0, stream)
        with awake(engine):
            return episodes.play(engine, requests, prompts, Sampling())


def episode(trajectory: Trajectory) -> Episode:
    """Its episode, which did not break."""
    assert trajectory.episode is not None and trajectory.episode.failure is None, trajectory.episode
    return trajectory.episode


ROWS = [{"environment": "products"}, {"environment": "game"}, {"environment": "products"}]


def test_the_row_chooses_its_environment_which_gives_the_prompt(tmp_path: Path) -> None:
    config = make_config(tmp_path / "rows.jsonl", ROWS)
    trajectories = played(config)
    texts: list[set[str]] = [{episode(t).prompt.text for t in trajectories if t.group == group} for group in range(3)]
    assert all(len(each) == 1 for each in texts), "a group plays one game"
    ((first,), (second,), (third,)) = texts
    assert first.startswith("What is ") and third.startswith("What is ") and first != third
    assert second == "Guess my number from 1 to 7.\nAnswer:"
    for each in trajectories:
        of_game = each.group == 1
        assert (episode(each).reward is None) == of_game and episode(each).rewards == {"arcade:by_kind": float(of_game)}
        for message in episode(each).messages:
            for call in message.get("tool_calls", []):
                known = call["function"]["name"] == ("guess" if of_game else "calculator")
                assert known or episode(each).outcomes["malformed"]
    assert {episode(t).reward for t in trajectories if t.group != 1} == {0.0, 1.0}
    again = played(replace(config, environment=replace(config.environment, workers=2)))
    assert [(t.ids, episode(t).reward) for t in again] == [(t.ids, episode(t).reward) for t in trajectories]
    (other,) = {episode(t).prompt.text for t in played(config, "train/1") if t.group == 0}
    assert other != first, "each step has games of its own"


def test_a_prompt_shows_the_tools_of_its_environment_alone(tmp_path: Path) -> None:
    rows = [*ROWS, {"environment": "game", "prompt": "Play."}]
    config = make_config(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = (
        "{%- for t in tools -%}{{ t.function.name }} {% endfor -%}"
        "{%- for m in messages -%}{{ m.content }}{%- endfor -%}"
    )
    host = open_host(config)
    assert host is not None
    with host:
        assert [name for name, _ in described(host)] == ["products: calculator", "game: guess"]
        assert for_prompts(tokenizer, host) is tokenizer
        config.data.prompt_column = "prompt"
        for streaming in (False, True):
            config.data.streaming = streaming
            prompts, _ = load_training(prompt_reader(config, tokenizer, host), config.train)
            assert [prompt.text for prompt in prompts] == ["calculator ", "guess ", "calculator ", "guess Play."]


@pytest.mark.parametrize("row", [{"environment": "gmae"}, {"prompt": "Play."}])
def test_a_row_names_an_environment(row: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(tmp_path / "rows.jsonl", [*ROWS, row])
    tokenizers = {"products": TOKENIZER, "game": TOKENIZER}
    with pytest.raises(ValueError, match=r"line 4: 'environment' is .*expected a name of .*products, game"):
        load_training(PromptReader(config.data, TOKENIZER, [], tokenizers), config.train)


def test_a_prompt_comes_from_the_row_or_from_its_environment(tmp_path: Path) -> None:
    (first, *_) = played(make_config(tmp_path / "rows.jsonl", [{"environment": "game", "hint": "none"}]))
    assert first.episode is not None and "the row has no prompt" in str(first.episode.failure)
    with pytest.raises(ValueError, match=r"data\.prompt_column"):
        replace(make_config(tmp_path / "rows.jsonl", ROWS), environment=EnvironmentConfig(tools=["arcade:roll_alone"]))
    user, empty = {"role": "user", "content": "Play."}, {"role": "user", "content": ""}
    assert with_observation([user], "Now.") == [{"role": "user", "content": "Play.\nNow."}]
    assert with_observation([empty], "Now.") == [{"role": "user", "content": "Now."}]
    assert with_observation([empty], [user]) == [user] and with_observation([user], [user]) == [user, user]


@pytest.mark.parametrize("max_turns", [2, 3])
def test_an_environment_may_answer_turns_without_tools(max_turns: int, tmp_path: Path) -> None:
    config = make_config(tmp_path / "rows.jsonl", [{"n": 1}], factory="arcade:Examiner",
                         max_turns=max_turns)  # fmt: skip
    config.rollout.max_completion_length, config.rewards = 200, [RewardConfig("environment")]
    trajectories = played(config)
    whole = [t for t in trajectories if episode(t).turns == max_turns]
    assert len(whole) > 1, "some are cut before"
    for each in whole:
        replies = [f"No, < |endoftext|>{n + 1}." for n in range(max_turns - 1)]
        runs = [(sampled, [token for token, _ in run])
                for sampled, run in groupby(zip(each.ids, each.sampled, strict=True), itemgetter(1))]  # fmt: skip
        between = [TOKENIZER.decode(run) for sampled, run in runs if not sampled]
        assert between == [f"{reply}\nAnswer:" for reply in replies]
        said = [message["content"] for message in episode(each).messages if message["role"] == "assistant"]
        assert said == [TOKENIZER.decode(run, skip_special_tokens=True) for sampled, run in runs if sampled]
        assert [message["role"] for message in episode(each).messages[:3]] == ["assistant", "user", "assistant"]
        assert each.finished == (max_turns == 3) and episode(each).reward == max_turns
        assert not sum(episode(each).outcomes.values())


def rolled(host: EnvironmentHost, episode: int, seed: int) -> str:
    """All that an episode with this seed draws."""
    host.reset(episode, {}, seed)
    answers: list[Any] = []
    for calls in ([], ["roll", "roll_alone", "roll_alone"], ["roll_later", "roll_alone"]):
        if calls:
            host.call(episode, [(name, {}) for name in calls])
        (event,) = host.poll(30.0)
        answers += event.answer.get("answers", [event.answer])
    host.end(episode)
    return json.dumps(answers)


def test_what_an_environment_draws_follows_from_the_seed() -> None:
    config = EnvironmentConfig(factory="arcade:Dice", tools=["arcade:roll_alone"], workers=1)
    with EnvironmentHost(config) as host:
        first, other, again = (rolled(host, episode, seed) for episode, seed in enumerate((5, 6, 5)))
        host.reset(7, {}, 5)  # another episode draws meanwhile
        host.poll(30.0)
        assert first == again != other and rolled(host, 8, 5) == first
    numbers = [each["text"] for each in json.loads(first)[1:]]
    assert len(set(numbers)) == len(numbers)
