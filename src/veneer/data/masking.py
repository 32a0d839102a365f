"""Token ids of a sample, and which of them are trained.

Nothing is guessed: where an answer begins in the tokens is where the tokens of everything before it end, exactly as
they will be when the model is asked. Where joint tokenization would blur that border, the text is cut there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from veneer.core.errors import DataError
from veneer.data.formats import Sample
from veneer.data.templates import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Masked:
    """Token ids with one flag each."""

    input_ids: list[int]
    trained: list[bool]
    """Whether the token is to be predicted."""


def masked(sample: Sample, tokenizer: PreTrainedTokenizerBase, *, completions_only: bool) -> list[Masked]:
    """The tokens of one sample: mostly one sequence, one for each answer where a template rewrites earlier turns.

    In a chat or pair every assistant turn is trained, the token that ends it included (eos is added where the
    template writes none), and the rest is not. Of a plain text, and with ``completions_only=False``, all is trained.

    Raises:
        DataError: the template refuses the conversation, or its text does not grow turn by turn.
    """
    if sample.kind == "text":
        ids = list(tokenizer(sample.text, verbose=False)["input_ids"])
        return [_closed(Masked(ids, [True] * len(ids)), tokenizer)]
    if not completions_only:
        ids = _ids(tokenizer, render(tokenizer, sample.messages, tools=sample.tools, origin=sample.origin))
        return [_closed(_ended(Masked(ids, [True] * len(ids)), tokenizer), tokenizer)]
    if not any(message["role"] == "assistant" for message in sample.messages):
        ids = _ids(tokenizer, render(tokenizer, sample.messages, tools=sample.tools, origin=sample.origin))
        return [Masked(ids, [False] * len(ids))]
    whole = _spans(sample, tokenizer, sample.messages, every_answer=True)
    if whole is not None:
        return [_tokens(tokenizer, *whole)]
    return [_tokens(tokenizer, *_one_answer(sample, tokenizer, turn)) for turn in _answers(sample.messages)]


def _answers(messages: Sequence[dict[str, Any]]) -> list[int]:
    return [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]


def _spans(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, every_answer: bool
) -> tuple[str, Spans] | None:
    """The rendered text and where each answer stands in it; None when it does not grow turn by turn."""
    last = _answers(messages)[-1]
    text = render(tokenizer, messages[: last + 1], tools=sample.tools, origin=sample.origin)
    spans = []
    for turn in _answers(messages) if every_answer else [last]:
        before = render(
            tokenizer, messages[:turn], add_generation_prompt=True, tools=sample.tools, origin=sample.origin
        )
        after = (
            text if turn == last else render(tokenizer, messages[: turn + 1], tools=sample.tools, origin=sample.origin)
        )
        if not (text.startswith(after) and after.startswith(before)):
            return None
        spans.append((len(before), len(after)))
    return text, spans


def _one_answer(sample: Sample, tokenizer: PreTrainedTokenizerBase, turn: int) -> tuple[str, Spans]:
    """As ``_spans`` for the conversation up to one answer, as it stands when that answer is asked for."""
    found = _spans(sample, tokenizer, sample.messages[: turn + 1], every_answer=False)
    if found is None:
        raise DataError(
            f"{sample.origin} cannot be masked: the chat template rewrites what stands before message {turn + 1} when "
            "that answer is added; use train_on=all, or a tokenizer with another template."
        )
    return found


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, spans: Spans) -> Masked:
    """The tokens of a text whose ``spans`` (character ranges, in order) are trained."""
    borders = [0, *(border for span in spans for border in span)]
    pieces = _joint(tokenizer, text, borders) or [_ids(tokenizer, text[a:b]) for a, b in pairwise(borders)]
    ids: list[int] = []
    trained: list[bool] = []
    for number, piece in enumerate(pieces):
        ids += piece
        trained += [number % 2 == 1] * len(piece)
    return _closed(_ended(Masked(ids, trained), tokenizer), tokenizer)


def _joint(tokenizer: PreTrainedTokenizerBase, text: str, borders: Sequence[int]) -> list[list[int]] | None:
    """The text's tokens in pieces between the borders; None where the tokens up to a border are not the first ones."""
    whole = _ids(tokenizer, text[: borders[-1]])
    counts = [0]
    for border in borders[1:-1]:
        upto = _ids(tokenizer, text[:border])
        if whole[: len(upto)] != upto or len(upto) < counts[-1]:
            return None
        counts.append(len(upto))
    return [whole[a:b] for a, b in pairwise([*counts, len(whole)])]


def _ended(tokens: Masked, tokenizer: PreTrainedTokenizerBase) -> Masked:
    """Of each answer, what stands behind its eos (a line break, mostly) is no longer trained."""
    eos = tokenizer.eos_token_id
    trained = list(tokens.trained)
    start = 0
    while eos is not None and start < len(trained):
        end = start
        while end < len(trained) and trained[end] == trained[start]:
            end += 1
        answer = tokens.input_ids[start:end]
        if trained[start] and eos in answer:
            stop = end - answer[::-1].index(eos)
            if not tokenizer.decode(tokens.input_ids[stop:end]).strip():
                trained[stop:end] = [False] * (end - stop)
        start = end
    return Masked(tokens.input_ids, trained)


def _closed(tokens: Masked, tokenizer: PreTrainedTokenizerBase) -> Masked:
    """The same up to the last trained token, which is eos: so a completion, even an empty one, learns to end."""
    behind = tokens.trained[::-1].index(True) if True in tokens.trained else 0
    count = len(tokens.trained) - behind
    ids, trained = tokens.input_ids[:count], tokens.trained[:count]
    eos = tokenizer.eos_token_id
    if eos is not None and (ids[-1:], trained[-1:]) != ([eos], [True]):
        ids, trained = [*ids, eos], [*trained, True]
    return Masked(ids, trained)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
