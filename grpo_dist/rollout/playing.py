"""From the options of an environment to what plays its episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..config.schema import Config
from ..data.prompts import PromptReader, Tokenizers, render
from ..environments.host import EnvironmentHost
from ..rewards.registry import answer_checks
from ..text.templates import Messages
from ..text.tokens import CompletionTexts
from ..text.tool_turns import ToolTurns, with_tools
from ..types import Prompt, Trajectory
from . import Engine, Request, Sampling, sample
from .episodes import Episodes, Observation

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def open_host(config: Config) -> EnvironmentHost | None:
    """The processes of the config's environment; None where there is none. Raises ValueError with the user's mistake,
    and where a process ends while it imports its tools."""
    if config.environment is None:
        return None
    host = EnvironmentHost(config.environment, config.rewards)
    has_reward = any(reward.name == "environment" for reward in config.rewards)
    factories = " or ".join(config.environment.factories.values())
    if host.has_reward != has_reward:
        host.close()
        raise ValueError(
            f"rewards: {factories} has a get_reward, and no reward is named `environment`: add "
            "{name: environment}, with weight 0 if it is only to be written down" if host.has_reward else
            f"rewards: `environment` given, and {factories or 'a list of tools'} has no get_reward"
        )  # fmt: skip
    return host


def described(host: EnvironmentHost) -> list[tuple[str, str]]:
    """Name and description of each tool; those of several environments are written `environment: tool`."""
    functions = [(name, schema["function"]) for name, schemas in host.schemas.items() for schema in schemas]
    return [
        (": ".join(filter(None, [name, function["name"]])), function["description"]) for name, function in functions
    ]


def for_prompts(tokenizer: PreTrainedTokenizerBase, host: EnvironmentHost | None) -> PreTrainedTokenizerBase:
    """The tokenizer that renders prompts: its template knows the tools, unless a row's environment chooses them."""
    return tokenizer if host is None or "" not in host.schemas else with_tools(tokenizer, host.schemas[""])


def by_environment(tokenizer: PreTrainedTokenizerBase, host: EnvironmentHost | None) -> Tokenizers:
    """The tokenizers that render prompts where the data's column `environment` chooses the tools; else none."""
    if host is None or "" in host.schemas:
        return {}
    return {name: with_tools(tokenizer, schemas) for name, schemas in host.schemas.items()}


def prompt_reader(config: Config, tokenizer: PreTrainedTokenizerBase, host: EnvironmentHost | None) -> PromptReader:
    """What makes the config's prompts: its templates know the tools, and its rewards check the gold answers."""
    checks = answer_checks(config.rewards) if config.data.answer_column else []
    return PromptReader(config.data, for_prompts(tokenizer, host), checks, by_environment(tokenizer, host))


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
    config: Config, host: EnvironmentHost | None, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]
) -> Episodes | None:
    """What plays; `tokenizer` is the model's. Raises ValueError where its template cannot go on after tools."""
    if host is None or config.environment is None:
        return None
    data, call_format = config.data, config.environment.call_format
    tokenizers = by_environment(tokenizer, host) or {"": for_prompts(tokenizer, host)}
    turns = {name: ToolTurns(each, end_ids, host.tools(name), data.template_date, call_format,
                             has_users=name in host.with_users) for name, each in tokenizers.items()}  # fmt: skip

    def begun(prompt: Prompt, observation: Observation) -> Prompt:
        assert prompt.messages is not None, "prompts with tools are conversations"
        if observation is None and prompt.messages[-1]["content"]:
            return prompt
        name = host.name_of(prompt.columns)
        if isinstance(observation, str):
            observation = turns[name].without_specials(observation)
        elif observation is not None:
            observation = [{**each, "content": turns[name].without_specials(each["content"])} for each in observation]
        messages = with_observation(prompt.messages, observation)
        rendered = render(messages, replace(data, system_prompt=None), tokenizers[name])
        if len(rendered.ids) > data.max_prompt_length:
            raise ValueError(f"the prompt has {len(rendered.ids)} tokens with what the environment said at its reset, "
                             f"expected at most data.max_prompt_length = {data.max_prompt_length}")  # fmt: skip
        return replace(prompt, ids=rendered.ids, text=rendered.text, messages=rendered.messages)

    return Episodes(host, turns, config.environment, config.rollout.max_completion_length,
                    CompletionTexts(tokenizer, end_ids), begun, end_ids)  # fmt: skip


def with_observation(messages: Messages, observation: Observation) -> Messages:
    """The conversation with what an environment said: messages follow it, a text follows in its last message.

    Raises ValueError where there is no prompt then.
    """
    *before, last = messages
    if isinstance(observation, list):
        return [*before, *([last] if last["content"] else []), *observation]
    content = "\n".join(filter(None, [last["content"], observation]))
    if not content:
        raise ValueError("the row has no prompt, and reset returned none: return a text or messages")
    return [*before, {**last, "content": content}]
