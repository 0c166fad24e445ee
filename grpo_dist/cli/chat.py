"""`python -m grpo_dist chat`: talk to a trained model and see the answers of its base model beside it.

    python -m grpo_dist chat runs/quickstart
    python -m grpo_dist chat runs/quickstart --prompt "What is 12 - 7? Answer with an integer."
    python -m grpo_dist chat runs/calculator --row 3

Prompts go through the tokenizer's chat template, with data.system_prompt, unless the tokenizer has none or
data.chat_template is `never`. With a template, each model remembers its own conversation. Answers are greedy unless
--temperature is given; sampling then uses the run's top_p, top_k and min_p. Stop texts, banned tokens and
min_new_tokens are the run's. The penalties and limits of the model's generation_config.json are not used, as in
training. Ctrl-D or an empty line ends the chat.

Where the run has an environment, each prompt begins an episode of its own. It is shown token by token: who wrote it,
its log-probability, and the entropy of the distribution that it was drawn from (nats, at temperature 1).
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.checks import require, require_seed
from ..config.places import require_run
from ..distributed.process import imports
from ..text.plain import write_stage

if TYPE_CHECKING:
    from ..checkpoint.trained import Trained


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run_or_checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT", help="train.output_dir, or a "
                        "checkpoint in it")  # fmt: skip
    parser.add_argument("--prompt", help="answer this prompt and end")
    parser.add_argument("--row", type=int, metavar="N", help="play an episode on this row of the run's data.eval_file, "
                        "or train_file, from 0, and end")  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (rollout.max_completion_length)")
    parser.add_argument("--temperature", type=float, default=0.0, help="temperature of sampling; 0 is greedy (0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (0)")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Answer one prompt, or each typed one. Raises ValueError, OSError."""
    require(not rest, "arguments", list(rest), "a run or a checkpoint, and the options of --help")
    require_run(options.run_or_checkpoint)
    require(0 <= options.temperature < math.inf, "--temperature", options.temperature, "0 or more")
    require_seed("--seed", options.seed)
    require(options.max_new_tokens is None or options.max_new_tokens > 0, "--max_new_tokens", options.max_new_tokens,
            "at least 1")  # fmt: skip
    with imports(write_stage):
        from ..checkpoint.trained import find, load
        from ..monitoring.console import set_up_logging
        from .conversation import Conversation

    set_up_logging()
    trained = find(options.run_or_checkpoint)
    if trained.config.get("environment"):
        return _play(trained, options)
    require(options.row is None, "--row", options.row, "a run with an environment")
    policy, tokenizer = load(trained)
    conversation = Conversation(trained, policy, tokenizer, options.temperature, options.max_new_tokens, options.seed)
    _converse(conversation.answer, options.prompt)
    return 0


def _play(trained: Trained, options: argparse.Namespace) -> int:
    """Play episodes of the run's environment."""
    from ..checkpoint.trained import load
    from ..config.parse import parse_config
    from .episode import EpisodeChat

    config = parse_config(["--config", str(trained.run / "config.yaml")])
    if options.max_new_tokens is not None:
        config.rollout.max_completion_length = options.max_new_tokens
    with contextlib.closing(EpisodeChat(trained, *load(trained), config, options.temperature, options.seed)) as chat:
        if options.row is not None:
            chat.answer_row(options.row)
        else:
            _converse(chat.answer, options.prompt)
    return 0


def _converse(answer: Callable[[str], None], prompt: str | None) -> None:
    """Answer one prompt, or each typed one."""
    if prompt is not None:
        answer(prompt)
        return
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while typed := input("you> ").strip():
            answer(typed)
