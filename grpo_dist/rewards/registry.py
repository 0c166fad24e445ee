"""From a RewardConfig to a function that can be called: built-in names, import paths, arguments, signatures.

Every error in a configured reward is raised here as a ValueError for the user, before its first call. The workers of
the pool resolve rewards, so that a user's module is never imported into the training process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.checks import did_you_mean
from ..config.rewards import RewardConfig
from ..text.files import near_paths
from ..text.plain import exception_line
from .placement import Placement, most_items_of, placement_of

BUILT_IN = {
    "math": "grpo_dist.rewards.math:MathRewardModel",
    "math_verify": "grpo_dist.rewards.math_verify:MathVerifyReward",
    "gsm8k": "grpo_dist.rewards.extraction:Gsm8kReward",
    "boxed": "grpo_dist.rewards.extraction:BoxedReward",
    "format": "grpo_dist.rewards.format:FormatReward",
    "length": "grpo_dist.rewards.length:LengthReward",
    "overlong": "grpo_dist.rewards.length:OverlongReward",
    "repetition": "grpo_dist.rewards.repetition:RepetitionReward",
    "code": "grpo_dist.rewards.code:CodeReward",
    "reward_model": "grpo_dist.rewards.reward_model:RewardModelReward",
    "judge": "grpo_dist.rewards.judge:JudgeReward",
    "reasoning_gym": "grpo_dist.rewards.reasoning_gym:ReasoningGymReward",
    "remote": "grpo_dist.rewards.remote:RemoteReward",
    "environment": "grpo_dist.rewards.environment:environment",
}
"""Names of the rewards that ship with the package, with their import paths."""
KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""Arguments of every reward function beside the data's columns (TRL's names)."""
EPISODE_COLUMNS = ("environment_reward", "environments")
"""What an episode adds to the data's columns: what its environment's `get_reward` returned, and what the rewards that
take `environments` gave it, by name."""


@dataclass(frozen=True)
class TrainerState:
    """The run, for a reward that takes `trainer_state` (TRL's names)."""

    global_step: int = 0
    """Steps done."""
    max_steps: int = 0
    """Steps of the run."""
    epoch: float = 0.0
    """Passes through the data."""


@dataclass(frozen=True)
class Parameters:
    """Which keywords a reward function takes."""

    accepted: frozenset[str] | None
    """Names it accepts; None where it has **kwargs and accepts any."""
    required: frozenset[str]
    """Names that it requires."""
    bound: frozenset[str]
    """Names that are not filled in by columns: the config's args override them."""
    most_items: int | None = None
    """The most completions of a call; None where the function declares none."""

    def takes(self, name: str) -> bool:
        """Whether the function takes this keyword."""
        return name not in self.bound and (self.accepted is None or name in self.accepted)

    def check_columns(self, reward: str, columns: Iterable[str]) -> None:
        """Raise ValueError where the function requires a column that is not among `columns`."""
        columns = set(columns)
        missing = sorted(self.required - columns - set(KEYWORDS))
        if missing:
            raise ValueError(
                f"rewards: {reward!r} needs the argument(s) {', '.join(missing)}, which are neither columns of the "
                f"data ({', '.join(sorted(columns)) or 'none'}) nor under its args: add the column, give the argument "
                f"under args, or give it a default{did_you_mean(missing[0], columns)}"
            )


@dataclass(frozen=True)
class RewardFunction:
    """A reward that is ready to be called."""

    name: str
    """Its name in the config."""
    function: Callable[..., Any]
    """The function with the config's arguments bound; its results are not checked here."""
    parameters: Parameters
    """The keywords it takes, without those that are bound."""
    placement: Placement
    """Where it declares to run."""


def labels(rewards: Sequence[RewardConfig]) -> list[str]:
    """Return a short name for each reward in metrics: the function's name, with a number where it is not unique."""
    names: list[str] = []
    for reward in rewards:
        short = reward.name.rpartition(":")[2].rpartition(".")[2]
        name, count = short, 1
        while name in names:
            count += 1
            name = f"{short}_{count}"
        names.append(name)
    return names


def answer_checks(rewards: Sequence[RewardConfig]) -> list[Callable[[object], None]]:
    """Return the built-in rewards' checks of a gold answer; each raises ValueError for one that it cannot read."""
    built_in = [import_object(BUILT_IN[reward.name], reward.name) for reward in rewards if reward.name in BUILT_IN]
    return [reward.check_answer for reward in built_in if hasattr(reward, "check_answer")]


def answer_reader(rewards: Sequence[RewardConfig]) -> Callable[[str], str | None] | None:
    """Return the function by which the first built-in reward reads a completion's answer; None where none does."""
    for reward in rewards:
        if reward.name in BUILT_IN:
            reader = import_object(BUILT_IN[reward.name], reward.name)
            if hasattr(reader, "read_completion"):
                return reader.read_completion
    return None


def declared_placement(config: RewardConfig) -> Placement:
    """Return where a configured reward runs, without an instance of it. Raises ValueError as `resolve` does."""
    try:
        return placement_of(import_object(_import_path(config.name), config.name))
    except ValueError as error:
        raise ValueError(str(error) if config.name in str(error) else f"rewards: {config.name!r}: {error}") from error


def episode_columns(config: RewardConfig) -> set[str]:
    """Return which of EPISODE_COLUMNS a configured reward names. Raises ValueError where it cannot be imported."""
    imported = import_object(_import_path(config.name), config.name)
    try:
        names = inspect.signature(imported.__call__ if inspect.isclass(imported) else imported).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature, and `resolve` refuses the rest
        return set()
    return set(names) & set(EPISODE_COLUMNS)


def resolve(config: RewardConfig, *, has_environments: bool = False) -> RewardFunction:
    """Return the function that a config names, with its arguments bound. A class is instantiated with them.

    A reward that takes `environments` is called where these live, which is said by `has_environments`. Elsewhere the
    function returns what was given to each episode there.

    Raises ValueError where the name is unknown, the import fails, the object is not callable, an argument does not fit,
    or the function cannot be called as TRL calls one: `fn(prompts=…, completions=…, completion_ids=…, **columns)`.
    """
    imported = import_object(_import_path(config.name), config.name)
    takes_environments = "environments" in episode_columns(config)
    if takes_environments and not has_environments:
        function: Any = functools.partial(_given, config.name)
        return RewardFunction(config.name, function, _parameters(function, config.name, {}), placement_of(imported))
    if inspect.isclass(imported):
        function = _instantiate(imported, config)
        bound: dict[str, Any] = {}
    else:
        function, bound = imported, config.args
    if not callable(function):
        kind = type(function).__name__
        what = f"an instance of {kind}" if inspect.isclass(imported) else f"of type {kind}"
        raise ValueError(f"rewards: {config.name!r} is {what}, which cannot be called; expected a function")
    parameters = replace(_parameters(function, config.name, bound), most_items=most_items_of(imported))
    if not takes_environments:  # what is in **columns is not the instances
        parameters = replace(parameters, bound=parameters.bound | {"environments"})
    ready = functools.partial(function, **bound) if bound else function
    return RewardFunction(config.name, ready, parameters, placement_of(imported))


def _given(
    name: str, completions: Sequence[Any], environments: Sequence[Mapping[str, float | None]], **columns: Any
) -> list[float | None]:
    """Return what the reward `name` gave each episode where its environment lives."""
    return [given.get(name) for given in environments]


def _import_path(name: str) -> str:
    """Return `module:function` for a configured name. Raises ValueError, which says what is wrong with it."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    known = f"built in: {', '.join(BUILT_IN)}"
    if ":" not in name:
        own = "a function of your own is written module:function"
        if "/" in name:
            own = f"a reward model is written {{name: reward_model, args: {{model: {name}}}}}"
        elif "." in name:
            own += f", such as {':'.join(name.rsplit('.', 1))}"
        raise ValueError(f"rewards: {name!r} is not a built-in reward{did_you_mean(name, BUILT_IN)} ({known}); {own}")
    module, _, attribute = name.partition(":")
    if module.endswith(".py") or "/" in module:
        dotted = module.removesuffix(".py").strip("./").replace("/", ".")
        raise ValueError(
            f"rewards: {name!r} names a file, expected module:function; from the directory of the file, write "
            f"{dotted}:{attribute}"
        )
    if not module or not attribute:
        raise ValueError(f"rewards: {name!r} given, expected module:function or a built-in reward ({known})")
    return name


def file_digests(names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of the file of each `module:function`, which is looked for as an import would, but not imported.

    Built-in names have none.
    """
    digests = {}
    for name in names:
        module, _, function = name.partition(":")
        places = [Path(folder or ".", *module.split(".")) for folder in (*sys.path, "")] if function else []
        files = (file for place in places for file in (place / "__init__.py", place.with_suffix(".py")))
        for file in filter(Path.is_file, files):
            digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
            break
    return digests


def import_object(path: str, name: str, key: str = "rewards") -> Any:
    """Import `module:attribute`, also from the current directory; option `key` and `name` are for messages.

    Raises ValueError where the import fails, or the module has no such attribute.
    """
    module_name, _, attributes = path.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        imported: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything, and a script may exit
        frame = traceback.extract_tb(error.__traceback__)[-1]
        at = "" if "importlib" in frame.filename else f" ({frame.filename}, line {frame.lineno})"
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == module_name
        near = near_paths(f"{module_name}.py") if is_missing else ""
        raise ValueError(
            f"{key}: {name!r}: importing {module_name!r} failed with {exception_line(error)}{at}; "
            f"modules are imported from {os.getcwd()} and from the Python path{near}"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(imported, attribute):
            hint = did_you_mean(attribute, dir(imported))
            raise ValueError(f"{key}: {name!r}: {module_name!r} has no {attribute!r}{hint}")
        imported = getattr(imported, attribute)
    return imported


def _instantiate(cls: type, config: RewardConfig) -> Any:
    """Make the instance. Raises ValueError, which says why the arguments do not fit."""
    try:
        return cls(**config.args)
    except Exception as error:  # its constructor is the user's code, or it refuses the user's arguments
        given = f"cannot be made with the args {list(config.args)}"  # not their values: one may be a secret
        raise ValueError(f"rewards: {config.name!r} {given}: {exception_line(error)}") from error


def _parameters(function: Callable[..., Any], name: str, bound: dict[str, Any]) -> Parameters:
    """Read the keywords that a function takes, without those that are bound, and check that TRL's call fits."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature; the first call shows errors
        return Parameters(accepted=None, required=frozenset(), bound=frozenset(bound))
    kinds = inspect.Parameter
    given = signature.parameters.values()
    takes_any = any(parameter.kind is kinds.VAR_KEYWORD for parameter in given)
    by_name = [p for p in given if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    names = {parameter.name for parameter in by_name}
    unknown = sorted(key for key in bound if key in KEYWORDS or (key not in names and not takes_any))
    if unknown:
        raise ValueError(
            f"rewards: {name!r} was given the args {unknown}, which it does not take or which every call fills in"
            f"{did_you_mean(unknown[0], names)}; its signature is {signature}"
        )
    positional = [p.name for p in given if p.kind is kinds.POSITIONAL_ONLY and p.default is kinds.empty]
    if positional or not (takes_any or names & {"completions", "completion_ids"}):
        raise ValueError(
            f"rewards: {name!r} has the signature {signature}; expected one that can be called with keywords as "
            "fn(prompts=..., completions=..., completion_ids=..., **columns) and takes at least `completions` or "
            "`completion_ids`"
        )
    required = frozenset(p.name for p in by_name if p.default is kinds.empty and p.name not in bound)
    return Parameters(None if takes_any else frozenset(names), required, frozenset(bound))
