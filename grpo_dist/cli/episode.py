"""An episode that a trained model and its base model play each, token by token: who wrote it, and how likely it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from rich.text import Text
from torch import Tensor, nn

from ..algorithm.hashing import stream_key
from ..checkpoint.trained import Trained
from ..config.schema import Config
from ..data.prompts import PromptReader, render
from ..model.config_files import end_token_ids
from ..model.policy import Policy
from ..monitoring.traces import MODEL, TEMPLATE, TOOL, writers
from ..rollout import LoadedModel, LocalEngine, Request, RowDecoder, awake
from ..rollout.playing import by_environment, episodes_of, for_prompts, open_host, templated
from ..rollout.sampling import sampling_with
from ..text.plain import plain_lines
from ..text.result_console import ResultConsole
from ..text.tokens import CompletionTexts
from ..types import Prompt, Trajectory
from .conversation import Voice, voices

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

WRITERS = {MODEL: "model", TOOL: "environment", TEMPLATE: "template"}
STYLES = {MODEL: "bold", TOOL: "cyan", TEMPLATE: "dim"}
_LINE_CHARACTERS = 10_000


@dataclass(frozen=True)
class Token:
    """A token of a row."""

    text: str
    by: str
    """Who wrote it, one of WRITERS."""
    logprob: float | None
    """The model's log-probability of it (nats); None for tokens that it did not sample."""
    entropy: float | None
    """Entropy of the distribution it was drawn from (nats)."""


class EpisodeChat:
    """Episodes of a run's environment; close it."""

    def __init__(
        self, trained: Trained, policy: Policy, tokenizer: PreTrainedTokenizerBase, config: Config,
        temperature: float, seed: int,
    ) -> None:  # fmt: skip
        """A temperature of 0 is greedy. Raises ValueError where the environment cannot be started."""
        self.trained, self.policy, self.tokenizer, self.seed = trained, policy, tokenizer, seed
        self.config = templated(config)
        self.ends = end_token_ids(trained.model, tokenizer)
        self.sampling = replace(sampling_with(config.rollout, tokenizer, self.ends, policy.causal_lm.config),
                                temperature=temperature or 1.0, greedy=not temperature)  # fmt: skip
        self.host = open_host(config)
        episodes = episodes_of(self.config, self.host, tokenizer, self.ends)
        assert self.host is not None and episodes is not None, "the run has an environment"
        self.episodes, self.texts_of = episodes, CompletionTexts(tokenizer, self.ends)
        self.console = ResultConsole()

    def close(self) -> None:
        """End the processes of the environment."""
        self.episodes.host.close()

    def answer(self, prompt: str) -> None:
        """Play an episode that begins with a prompt, on a row of the data without further columns."""
        rendered = render(prompt, self.config.data, for_prompts(self.tokenizer, self.host))
        self.play(Prompt(0, rendered.ids, rendered.text, rendered.messages))

    def answer_row(self, number: int) -> None:
        """Play an episode on a row (from 0) of data.eval_file, or of the training data. Raises ValueError, OSError."""
        data = self.config.data
        path = data.eval_file or next(iter(data.train_files))
        split = data.eval_split if data.eval_file else data.train_split
        reader = PromptReader(data, for_prompts(self.tokenizer, self.host),
                              tokenizers=by_environment(self.tokenizer, self.host))  # fmt: skip
        prompts, _ = reader.load(path, split)
        if not 0 <= number < len(prompts):
            raise ValueError(f"--row: {number} given, expected 0 to {len(prompts) - 1}, a row of {path}")
        self.play(prompts[number])

    def play(self, prompt: Prompt) -> None:
        """Print the episodes of both models on a prompt."""
        for voice in voices(self.trained, self.policy):
            print(f"--- {voice.name}", flush=True)
            with voice.adapters():
                trajectory = self._played(voice, prompt)
                self._show(trajectory, token_figures(voice.model, self._row(trajectory), trajectory, self.texts_of))

    def _played(self, voice: Voice, prompt: Prompt) -> Trajectory:
        longest = self.config.rollout.max_completion_length
        engine = LocalEngine(RowDecoder(self.ends, longest), LoadedModel(voice.model), {})
        key = stream_key(self.seed, "chat")
        request = Request(0, 0, prompt.ids, key, stream_key(self.seed, "chat", "prompt"))
        with awake(engine):
            (trajectory,) = self.episodes.play(engine, [request], [prompt], self.sampling)
        return trajectory

    @staticmethod
    def _row(trajectory: Trajectory) -> list[int]:
        assert trajectory.episode is not None, "an episode was played"
        return [*trajectory.episode.prompt.ids, *trajectory.ids]

    def _show(self, trajectory: Trajectory, tokens: Sequence[Token]) -> None:
        episode = trajectory.episode
        assert episode is not None, "an episode was played"
        print(plain_lines(episode.prompt.text, _LINE_CHARACTERS))
        if self.console.is_terminal:
            self.console.print(Text.assemble(*((token.text, STYLES[token.by]) for token in tokens)))
        for token in tokens:
            figures = ("", "") if token.logprob is None else (f"{token.logprob:.3f}", f"{token.entropy:.3f}")
            print(f"{WRITERS[token.by]:<11} {figures[0]:>9} {figures[1]:>7}  {token.text!r}")
        ending = "ended by itself" if trajectory.finished else "cut by a limit"
        if episode.failure is not None:
            ending = f"the environment broke: {plain_lines(episode.failure, _LINE_CHARACTERS)}"
        reward = "" if episode.reward is None else f", the environment's reward is {episode.reward:g}"
        print(f"({episode.turns} turns, {ending}{reward})", flush=True)


@torch.no_grad()
def token_figures(model: nn.Module, row: list[int], trajectory: Trajectory, texts_of: CompletionTexts) -> list[Token]:
    """The tokens after the prompt of a row of token ids, with the model's log-probabilities at temperature 1."""
    start = len(row) - len(trajectory.ids)
    logits: Tensor = model(input_ids=torch.tensor([row])).logits[0, start - 1 : -1].float()
    logprobs = torch.log_softmax(logits, -1)
    own = logprobs.gather(-1, torch.tensor(trajectory.ids)[:, None])[:, 0].tolist()
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    texts = texts_of.pieces(trajectory.ids)
    by = writers(texts, trajectory.sampled, trajectory.episode.messages if trajectory.episode else [])
    return [Token(text, who, *((logprob, entropy) if who == MODEL else (None, None)))
            for text, who, logprob, entropy in zip(texts, by, own, entropies.tolist(), strict=True)]  # fmt: skip
