"""From the options of an environment to what plays its episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..config.schema import Config
from ..data.prompts import render
from ..environments.host import EnvironmentHost
from ..text.tokens import CompletionTexts
from ..text.tool_turns import ToolTurns, with_tools
from ..types import Prompt, Trajectory
from . import Engine, Request, Sampling, sample
from .episodes import Episodes


def open_host(config: Config) -> EnvironmentHost | None:
    """The processes of the config's environment; None where there is none. Raises ValueError with the user's mistake,
    RuntimeError where a process cannot be started."""
    if config.environment is None:
        return None
    host = EnvironmentHost(config.environment, config.rewards)
    has_reward = any(reward.name == "environment" for reward in config.rewards)
    if host.has_reward != has_reward:
        host.close()
        raise ValueError(
            f"rewards: {config.environment.factory} has a get_reward, and no reward is named `environment`: add "
            "{name: environment}, with weight 0 if it is only to be written down" if host.has_reward else
            f"rewards: `environment` given, and {config.environment.factory or 'a list of tools'} has no get_reward"
        )  # fmt: skip
    return host


def described(host: EnvironmentHost) -> list[tuple[str, str]]:
    """Name and description of each tool."""
    functions = [schema["function"] for schema in host.schemas]
    return [(function["name"], function["description"]) for function in functions]


def for_prompts(tokenizer: Any, host: EnvironmentHost | None) -> Any:
    """The tokenizer that renders prompts: its template knows the tools."""
    return tokenizer if host is None else with_tools(tokenizer, host.schemas)


def templated(config: Config) -> Config:
    """The config with prompts that are rendered by the chat template where there are tools."""
    return config if config.environment is None else replace(config, data=replace(config.data, chat_template="always"))


def sample_or_play(
    engine: Engine, episodes: Episodes | None, requests: list[Request], prompts: Sequence[Prompt], sampling: Sampling,
    on_finish: Callable[[list[Trajectory]], None], check: Callable[[], None] | None = None,
) -> list[Trajectory]:  # fmt: skip
    """One trajectory a request: an answer, or where there are tools an episode; see `rollout.engine.sample`."""
    if episodes is None:
        return sample(engine, requests, sampling, on_finish, check)
    return episodes.play(engine, requests, prompts, sampling, on_finish, check)


def episodes_of(
    config: Config, host: EnvironmentHost | None, tokenizer: Any, end_ids: Sequence[int]
) -> Episodes | None:
    """What plays; `tokenizer` is the one for prompts. Raises ValueError where its template cannot go on after tools."""
    if host is None or config.environment is None:
        return None
    data = config.data
    turns = ToolTurns(tokenizer, end_ids, data.template_date, config.environment.call_format)

    def with_observation(prompt: Prompt, observation: str) -> Prompt:
        assert prompt.messages is not None, "prompts with tools are conversations"
        *before, last = prompt.messages
        content = f"{last['content']}\n{observation}" if last["content"] else observation
        rendered = render([*before, {**last, "content": content}], replace(data, system_prompt=None), tokenizer)
        if len(rendered.ids) > data.max_prompt_length:
            raise ValueError(f"the prompt has {len(rendered.ids)} tokens with what the environment said at its reset, "
                             f"expected at most data.max_prompt_length = {data.max_prompt_length}")  # fmt: skip
        return replace(prompt, ids=rendered.ids, text=rendered.text, messages=rendered.messages)

    return Episodes(host, turns, config.environment, config.rollout.max_completion_length,
                    CompletionTexts(tokenizer, end_ids), with_observation, end_ids)  # fmt: skip
