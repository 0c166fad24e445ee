"""The options of the data and of its curriculum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .checks import is_date, require, with_home

if TYPE_CHECKING:
    from .schema import Config


@dataclass
class CurriculumConfig:
    """Which prompts get a group of completions, by the share of right completions in their last group."""

    low: float = 0.05
    """Prompts with a smaller share of right completions are passed over."""
    high: float = 0.95
    """Prompts with a greater share are passed over."""
    rest_epochs: int = 2
    """Passes through the data for which such prompts are passed over."""

    def __post_init__(self) -> None:
        require(0 <= self.low <= self.high <= 1, "data.curriculum", (self.low, self.high), "0 <= low <= high <= 1")
        require(self.rest_epochs >= 1, "data.curriculum.rest_epochs", self.rest_epochs, "1 or more")


@dataclass
class DataConfig:
    """Where prompts come from and how they are read."""

    train_file: str | dict[str, float] = "configs/data/math_tasks_train.jsonl"
    """A JSONL, JSON, CSV or parquet file, a directory, or a hub id: what `datasets.load_dataset` takes; or
    `reasoning_gym:chain_sum?size=1000` for tasks of reasoning-gym. Several with weights are a mixture:
    `{a.jsonl: 2, b.jsonl: 1}`."""
    eval_file: str | None = None
    """The same for evaluation, held-out prompts of the same task; null for none."""
    subset: str | None = None
    """Configuration name of a hub data set, such as `main`."""
    train_split: str = "train"
    """Split of `train_file` where it is a data set with splits."""
    eval_split: str = "test"
    """Split of `eval_file` where it is a data set with splits."""
    prompt_column: str | None = "prompt"
    """Column with the prompt: text, or a list of messages with `role` and `content`; null where environments give the
    prompts."""
    answer_column: str | None = "answer"
    """Column with the gold answer, which rewards receive as `answer`; null where there is none."""
    system_prompt: str | None = None
    """A system message that goes before every prompt (needs a chat template)."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Render prompts with the tokenizer's chat template: `auto` does so for messages, and for text too where a system
    prompt is set."""
    template_date: str | None = None
    """The date (YYYY-MM-DD) for chat templates that write today's; null is the day on which the run begins. A resumed
    run keeps it."""
    max_prompt_length: int = 512
    """Longest prompt in tokens, template included."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that cannot be used (no prompt, too long, an answer no reward can read): `error` names the
    first of them and stops; `drop` leaves them out and says how many."""
    too_long: Literal["bad_row", "drop", "truncate"] = "bad_row"
    """What to do with prompts above max_prompt_length: treat them as bad rows, leave them out, or keep their last
    max_prompt_length tokens, a BOS among them. The log says how many there are."""
    keep: dict[str, Any] | None = None
    """Use only rows with these values: for each column a value, a list of values, or `{min: …, max: …}`. The log says
    how many rows each column leaves out."""
    hold_out: bool = False
    """Leave training prompts out that `eval_file` has, too: a generator of small tasks makes the same ones again. The
    log says how many."""
    streaming: bool = False
    """Read rows when they are needed, for data that does not fit in memory; the order stays the same. Each row is
    checked when it is read, and a row that cannot be used stops the run."""
    curriculum: CurriculumConfig | None = None
    """Pass over prompts whose last group was too easy or too hard; null takes all prompts in turn."""

    @property
    def train_files(self) -> dict[str, float]:
        """The files of the training data, with their weights."""
        return {self.train_file: 1.0} if isinstance(self.train_file, str) else self.train_file

    def __post_init__(self) -> None:
        self.train_file, self.eval_file = with_home(self.train_file), with_home(self.eval_file)
        require(self.max_prompt_length >= 1, "data.max_prompt_length", self.max_prompt_length, "at least 1 token")
        require(self.template_date is None or is_date(self.template_date), "data.template_date", self.template_date,
                "a date as YYYY-MM-DD, or null")  # fmt: skip
        require(not (self.system_prompt and self.chat_template == "never"), "data.system_prompt", self.system_prompt,
                "null where data.chat_template is `never`")  # fmt: skip
        require(bool(self.train_file) and (isinstance(self.train_file, str) or min(self.train_file.values()) > 0),
                "data.train_file", self.train_file, "a file, or files with weights above 0")  # fmt: skip
        require(not self.streaming or (self.bad_rows, self.too_long, self.keep, self.hold_out) in [
            ("error", "bad_row", None, False), ("error", "truncate", None, False)], "data.streaming", self.streaming,
            "false where bad_rows, too_long, keep or hold_out leave rows out: a stream knows none")  # fmt: skip
        require(not self.hold_out or self.eval_file is not None, "data.hold_out", self.hold_out,
                "false where data.eval_file is null")  # fmt: skip


def check_curriculum(config: Config) -> None:
    """Raise ValueError for options that choose the prompts too, or choose them too early."""
    curriculum = config.data.curriculum
    require(curriculum is None or not config.rollout.max_resamples, "data.curriculum", curriculum,
            "null where rollout.max_resamples replaces prompts")  # fmt: skip
    require(curriculum is None or not config.rollout.lag, "data.curriculum", curriculum, "null where rollout.lag is 1: "
            "the next prompts are chosen before this step's pass rates are known")  # fmt: skip
