"""The `reward_model` reward: the score of a sequence-classification checkpoint.

A conversation is rendered with the reward model's own chat template, with the completion as its last assistant message;
a plain prompt and its completion are joined. The reward is the model's one output, or the probability of class `label`
(a number or a name) where it has several classes. A text longer than `max_length` is never cut: its completion stays
unscored, as an empty one does. One copy of the model runs on each rank, on the GPU of the policy where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config.model import ComputeDtype
from ..config.places import model_place
from ..text.templates import render_messages
from ..text.tokens import begun_once, tokens_around
from .placement import runs_in
from .text import completion_text

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@runs_in("gpu", most_items=256)
class RewardModelReward:
    """Reward completions by a model's output."""

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        label: int | str | None = None,
        batch_size: int = 16,
        dtype: ComputeDtype = "float32",
        max_length: int | None = None,
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model; `device: auto` is the rank's GPU or else the CPU, and `max_length` defaults to the model's.

        Raises ValueError where the checkpoint has no classification head, or `label` does not choose one of several
        classes, and OSError where there is no such model.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model = model_place(model, "model")
        given = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, **given)
        self.before, _ = tokens_around(self.tokenizer)
        self.model, loading = AutoModelForSequenceClassification.from_pretrained(
            model, config=stored_config(model, **given), dtype=getattr(torch, dtype), output_loading_info=True, **given
        )
        missing = sorted(loading["missing_keys"])
        if missing:
            raise ValueError(
                f"{model} has no weights for {', '.join(missing[:3])}: expected a sequence-classification checkpoint "
                "with a trained head"
            )
        self.label = _class_of(model, self.model.config, label)
        self.padding: int | None = self.model.config.get_text_config().pad_token_id
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.model.to(self.device).eval()
        self.batch_size = batch_size
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = max_length or longest or self.tokenizer.model_max_length

    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[float | Exception]:
        """Score completions; an exception stands for one whose text is too long."""
        encoded = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        rewards: list[float | Exception] = [
            ValueError(f"the text has {len(ids)} tokens, expected 1 to {self.max_length} (reward_model's max_length)")
            for ids in encoded
        ]
        # Texts of similar length share a batch, which saves padding.
        fitting = (n for n, ids in enumerate(encoded) if 1 <= len(ids) <= self.max_length)
        order = sorted(fitting, key=lambda n: len(encoded[n]))
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            for place, score in zip(places, self._scores([encoded[n] for n in places]), strict=True):
                rewards[place] = score
        return rewards

    def _encode(self, prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt + completion_text(completion))["input_ids"]
            return begun_once(ids, self.before)  # a prompt that was rendered before has a BOS
        if not self.tokenizer.chat_template:
            raise ValueError(f"{self.tokenizer.name_or_path} has no chat template, which conversations need")
        text = render_messages([*prompt, *completion], self.tokenizer, answered=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _scores(self, rows: list[list[int]]) -> list[float]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        # A decoder's score is that of the last token which is no padding. By a config without padding it is that of the
        # last one, whatever it is: padding is then a token with which no text ends.
        padding = self.padding
        if padding is None:
            padding = min({*range(len(rows) + 1)} - {row[-1] for row in rows})
        self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = padding
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        with torch.inference_mode():
            logits = self.model(ids.to(self.device), attention_mask=mask.long().to(self.device)).logits.float()
        return (logits[:, 0] if self.label is None else logits.softmax(-1)[:, self.label]).tolist()


def stored_config(model: str, **given: Any) -> PreTrainedConfig:
    """The model's config, without the attention that it may name: a package for it may be missing here."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, **given)
    config._attn_implementation = None
    return config


def _class_of(model: str, config: Any, label: int | str | None) -> int | None:
    """Return the class whose probability is the reward; None where the model has a single output."""
    names = {str(name): number for name, number in config.label2id.items()}
    if config.num_labels == 1:
        if label is not None:
            raise ValueError(f"label: {label!r} given, but {model} has a single output: leave it out")
        return None
    number = names.get(str(label), label)
    if not isinstance(number, int) or not 0 <= number < config.num_labels:
        raise ValueError(f"label: {label!r} given, expected one of the classes of {model}: {', '.join(names)}")
    return number
