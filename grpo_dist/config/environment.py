"""The options of episodes: tools that a model may call between its turns, and environments that it plays in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import require

ENVIRONMENT_COLUMN = "environment"
"""Column of the data that names the environment of a row where there are several."""


@dataclass
class EnvironmentConfig:
    """Turns of a model with tools' answers between them."""

    tools: list[str] = field(default_factory=list)
    """Functions that the model may call, as `module:function`; type hints and the docstring become their schema."""
    factory: str | dict[str, str] | None = None
    """A class or function, as `module:Class`, that makes an environment: its public methods are tools too. Several with
    names, as `{math: module:Math, game: module:Game}`: the data's column `environment` names the row's, and only its
    tools are shown. See docs/environments.md."""
    max_turns: int = 8
    """Turns of the model in an episode. An episode whose last turn still calls a tool counts as truncated, unless an
    environment is done by it."""
    max_tool_characters: int = 2000
    """Longest answer of a tool; the middle of a longer one is left out, and the answer says so."""
    stop_tools: list[str] = field(default_factory=list)
    """Tools that end the episode when they are called."""
    call_format: Literal["auto", "hermes", "llama3", "mistral", "harmony", "qwen_xml", "glm"] = "auto"
    """How the model writes calls; `auto` reads it off the chat template."""
    workers: int = 2
    """Processes on each rank that environments and tools run in."""
    reset_seconds: float = 60.0
    """Longest time an environment may take to begin an episode."""
    call_seconds: float = 30.0
    """Longest time for each call of a tool, and for an environment's reward."""
    memory_limit_gib: float = 8.0
    """Memory that a process of environments can allocate."""
    secrets: list[str] = field(default_factory=list)
    """Names of environment variables that tools need although they look like secrets."""

    def __post_init__(self) -> None:
        require(bool(self.tools) or bool(self.factory), "environment", None, "tools, a factory, or both")
        require(all(":" in name for name in self.own_code), "environment",
                [*self.tools, self.factory], "names written module:function")  # fmt: skip
        for key, least in {"max_turns": 1, "max_tool_characters": 100, "workers": 1}.items():
            require(getattr(self, key) >= least, f"environment.{key}", getattr(self, key), f"{least} or more")
        for key in ("reset_seconds", "call_seconds", "memory_limit_gib"):
            require(getattr(self, key) > 0, f"environment.{key}", getattr(self, key), "a number above 0")

    @property
    def own_code(self) -> list[str]:
        """The tools and environments, as `module:function`."""
        return [*self.tools, *self.factories.values()]

    @property
    def factories(self) -> dict[str, str]:
        """The factories by name; the name of a single one, which no column has to choose, is empty."""
        if isinstance(self.factory, dict):
            return self.factory
        return {"": self.factory} if self.factory else {}
