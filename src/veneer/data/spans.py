"""Questions about texts: where their answers stand, and the windows of tokens that an encoder takes them in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from veneer.core.errors import DataError, listed, nearest
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.texts import report, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("question", "context", "answers")
QUESTION, CONTEXT, ANSWERS = COLUMNS
_TEXT, _START = "text", "answer_start"


@final
@dataclass(frozen=True)
class Question:
    """What is asked of a text, and every answer that counts as right."""

    asked: str
    context: str
    answers: tuple[tuple[int, str], ...] | None
    """The character of the context that each begins at, and its text; empty where the context has none, None where
    nothing is known."""


def question_of(row: Row, *, labelled: bool = True) -> Question:
    """A row as SQuAD has it, its answers checked against its context.

    Args:
        row: with ``question``, ``context`` and ``answers``: texts with the places where they begin.
        labelled: whether it must have answers; without, they are not looked at.

    Raises:
        DataError: a column is missing or of another kind, or an answer does not stand where the row says.
    """
    asked, context = text_of(row, QUESTION), text_of(row, CONTEXT)
    if not context.strip():
        raise DataError(f"{row.origin} has an empty {CONTEXT}; expected a text.")
    if not labelled:
        return Question(asked, context, None)
    answers = _answers(row)
    for start, text in answers:
        _check(row, context, start, text)
    return Question(asked, context, tuple(answers))


def _answers(row: Row) -> list[tuple[int, str]]:
    if ANSWERS not in row.values:
        have = list(map(str, row.values))
        raise DataError(
            f"{row.origin} has no {ANSWERS}; its columns are {listed(have) or 'none'}.{nearest(ANSWERS, have, most=1)}"
        )
    value = row.values[ANSWERS]
    if isinstance(value, str) and value.strip():
        # A CSV cell can hold them only as JSON.
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise _unknown(row, value) from None
    if value is None or value == "":
        return []
    if isinstance(value, Mapping):
        texts, starts = value.get(_TEXT), value.get(_START)
        texts, starts = (texts, starts) if isinstance(texts, list) else ([texts], [starts])
        if not isinstance(starts, list) or len(starts) != len(texts):
            raise _unknown(row, value)
        value = [{_TEXT: text, _START: start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise _unknown(row, value)
    return [_answer(row, each) for each in value]


def _answer(row: Row, value: Mapping[str, Any]) -> tuple[int, str]:
    text, start = value.get(_TEXT), value.get(_START)
    if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool):
        raise _unknown(row, value)
    return start, text


def _unknown(row: Row, value: Any) -> DataError:
    shown = repr(value)
    return DataError(
        f"{row.origin} has {ANSWERS} = {shown[:57]}{'...' * (len(shown) > 57)}; expected texts with the characters of "
        f'the context that they begin at, {{"{_TEXT}": ["..."], "{_START}": [0]}}, or an empty list where the context '
        "has no answer."
    )


def _check(row: Row, context: str, start: int, text: str) -> None:
    if not text.strip():
        raise DataError(
            f"{row.origin} has an answer without text; where the context has no answer, {ANSWERS} is an empty list."
        )
    found = context[start : start + len(text)] if 0 <= start < len(context) else ""
    if found == text:
        return
    at = context.find(text)
    where = "it is nowhere in it" if at < 0 else f"it is at {at:,}"
    raise DataError(
        f"{row.origin} has the answer {_short(text)} at character {start:,} of its context, where "
        f"{_short(found) if found else f'nothing is (it has {len(context):,})'} stands; {where}."
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def encode_spans(
    rows: Sequence[Row],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    stride: int,
    truncate: Truncation,
) -> EncodedSet:
    """Each question with its context as one sequence, or as several when the context is too long for one.

    Labels are the places of the first answer's first and last token, both that of the first special token where the
    window does not have all of it. ``more`` has the window's text, the character of the context that it begins at, the
    first token of it and the characters of each of its tokens.

    Args:
        rows: where they come from.
        questions: of each row.
        tokenizer: a fast one.
        max_length: the most tokens of a sequence, special tokens included.
        stride: tokens of the context that a window has in common with the one before.
        truncate: "drop" and "fail" are for what needs several windows; otherwise nothing is lost.

    Raises:
        DataError: a question that leaves no room for its context, an answer without tokens; with "fail", one that is
            too long.
    """
    examples: list[Encoded] = []
    dropped = 0
    for row, question in zip(rows, questions, strict=True):
        count = len(tokenizer(question.asked, question.context)["input_ids"])
        if count > max_length and truncate == "drop":
            dropped += 1
            continue
        if count > max_length:
            if truncate == "fail":
                raise DataError(
                    f"{row.origin} has {count:,} tokens, and at most {max_length:,} are taken; raise max_length, or "
                    "let truncate be end, for windows, or drop."
                )
            _check_room(row, question, tokenizer, max_length, stride)
        examples += _windows(row, question, tokenizer, max_length, stride if count > max_length else 0)
    return EncodedSet(tuple(examples), report(rows, examples, cut=[], dropped=dropped))


def _check_room(row: Row, question: Question, tokenizer: Any, max_length: int, stride: int) -> None:
    asked = len(tokenizer(question.asked, add_special_tokens=False)["input_ids"])
    room = max_length - asked - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= stride:
        raise DataError(
            f"{row.origin} has a question of {asked:,} tokens, which leaves {max(0, room):,} of {max_length:,} to its "
            f"context, and windows have stride = {stride:,} in common; lower stride, or raise max_length."
        )


def _windows(row: Row, question: Question, tokenizer: Any, max_length: int, stride: int) -> list[Encoded]:
    tokenizer.truncation_side, side = "right", tokenizer.truncation_side
    try:
        tokens = tokenizer(
            question.asked,
            question.context,
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
    finally:
        tokenizer.truncation_side = side
    found = []
    for at, ids in enumerate(tokens["input_ids"]):
        of = tokens.sequence_ids(at)
        places = [place for place, text in enumerate(of) if text == 1]
        if not places:
            raise DataError(f"{row.origin} has a context without a single token; expected a text.")
        offsets = [list(tokens["offset_mapping"][at][place]) for place in places]
        # What stands before the first token and behind the last one belongs to no other window.
        begin = 0 if at == 0 else offsets[0][0]
        end = len(question.context) if at == len(tokens["input_ids"]) - 1 else offsets[-1][1]
        labels = _labels(row, question, offsets, begin, end)
        nowhere = nowhere_in(ids, tokenizer)
        more = {
            "first": places[0],
            "offsets": [[first - begin, last - begin] for first, last in offsets],
            "text": question.context[begin:end],
            "at": begin,
            "answers": None if question.answers is None else [text for _, text in question.answers],
        }
        if "token_type_ids" in tokens:
            more["token_type_ids"] = tokens["token_type_ids"][at]
        placed = [nowhere] * 2 if labels is None else [places[0] + place for place in labels]
        found.append(Encoded(row.origin, ids, placed if question.answers is not None else [], more))
    return found


def nowhere_in(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands for no answer: the class token, else the first one."""
    mark = tokenizer.cls_token_id
    return ids.index(mark) if mark is not None and mark in ids else 0


def _labels(row: Row, question: Question, offsets: list[list[int]], begin: int, end: int) -> list[int] | None:
    """The places of the first and last token of the first answer; None when the window does not have all of it."""
    if not question.answers:
        return None
    start, text = question.answers[0]
    first, last = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
    if first < begin or last > end:
        return None
    inside = [at for at, (left, right) in enumerate(offsets) if right > first and left < last]
    if not inside:
        raise DataError(f"{row.origin} has the answer {_short(text)}, of which the tokenizer makes no token.")
    return [inside[0], inside[-1]]
