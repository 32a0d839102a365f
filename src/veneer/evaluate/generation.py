"""Answers to prompts: with the tokenizer's chat template, a full attention mask, and every end token known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from veneer.core.errors import UsageError
from veneer.tasks.sampling import Sampling
from veneer.tasks.writing import choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from veneer.adapters.model import PeftModel

BASE = "base"
"""The name that the base model's answer stands under."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    adapter: str
    """The adapter in use, or "base"."""
    text: str
    """The answer without special tokens."""
    tokens: int
    """How many tokens were written, the end token included."""
    seconds: float
    """How long it took."""
    stopped: bool
    """Whether the model ended by itself, not at the limit."""


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, system: str | None = None) -> dict[str, Tensor]:
    """A prompt as ids and attention mask, each (1, tokens).

    The chat template is used when the tokenizer has one; without one the prompt is taken as it is.

    Raises:
        UsageError: an empty prompt, or a system message without a chat template to put it into.
    """
    if not prompt.strip():
        raise UsageError("The prompt is empty; expected some text.")
    if tokenizer.chat_template is None:
        if system is not None:
            raise UsageError("A system message was given, but this tokenizer has no chat template to put it into.")
        encoded = tokenizer(prompt, return_tensors="pt")
        return _with_mask(encoded)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return encode_messages(tokenizer, [*messages, {"role": "user", "content": prompt}])


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> dict[str, Tensor]:
    """A conversation that waits for an answer as ids and attention mask, each (1, tokens).

    Args:
        tokenizer: one with a chat template.
        messages: each with a role and content.

    Raises:
        UsageError: the template refuses them.
    """
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise UsageError(f"The chat template refuses the conversation: {str(error).rstrip('.')}.") from error
    return _with_mask(encoded)


def _with_mask(encoded: Any) -> dict[str, Tensor]:
    ids = encoded["input_ids"]
    return {"input_ids": ids, "attention_mask": encoded.get("attention_mask", torch.ones_like(ids))}


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: dict[str, Tensor],
    sampling: Sampling,
    *,
    name: str = BASE,
    on_text: Callable[[str], object] | None = None,
) -> Answer:
    """Let a model continue one encoded prompt.

    Args:
        model: a transformers model with a language head, adapted or not; it is left in eval mode.
        tokenizer: its tokenizer.
        encoded: what ``encode`` gave.
        sampling: how tokens are chosen.
        name: stands in the answer.
        on_text: called with each new piece of text as soon as it is complete.

    Raises:
        UsageError: the prompt leaves no room in the model's context.
    """
    given = {key: tensor.to(model.device) for key, tensor in encoded.items()}
    length = given["input_ids"].shape[1]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and length >= room:
        raise UsageError(f"The prompt has {length} tokens, and the model's context holds {room}; shorten the prompt.")
    options = choices(model, tokenizer, sampling)
    torch.manual_seed(sampling.seed)
    model.eval()
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            **given,
            **options,
            streamer=None if on_text is None else _Stream(tokenizer, on_text),
        )
    start_of_answer = 0 if model.config.is_encoder_decoder else length
    ids = out[0, start_of_answer:].tolist()
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Answer(
        name, text, len(ids), time.perf_counter() - start, bool(ids) and ids[-1] in (options["eos_token_id"] or ())
    )


def answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: dict[str, Tensor],
    sampling: Sampling,
    names: Sequence[str],
) -> list[Answer]:
    """The base model's answer and then each adapter's, all from the same seed on one copy of the base."""
    with model.disable_adapter():
        found = [answer(model, tokenizer, encoded, sampling)]
    for name in names:
        model.set_adapter(name, inference_mode=True)
        found.append(answer(model, tokenizer, encoded, sampling, name=name))
    return found


@final
class _Stream:
    """What ``generate`` calls a streamer: turns ids into text, whole characters only.

    Ids are decoded together, because a character may be spread over several tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], object]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.ids: list[int] = []
        self.shown = 0
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt (the first call) or new ids."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids.extend(value.reshape(-1).tolist())
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        """Show what is left."""
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.on_text(text[self.shown :])
            self.shown = len(text)
