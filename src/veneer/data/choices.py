"""Questions with choices: how they stand in rows, and what a model is given of each choice.

A sequence of a choice is a pair of texts for an encoder; for a language model, what comes before and how it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from veneer.core.errors import DataError, listed, nearest
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.texts import encode_texts, report, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, CONTEXT, CHOICES, ANSWER = "question", "context", "choices", "answer"
ENDINGS = tuple(f"ending{number}" for number in range(10))
"""Columns of one choice each, as SWAG has them."""
COLUMNS = (QUESTION, CONTEXT, CHOICES, ANSWER, *ENDINGS)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@final
@dataclass(frozen=True)
class Choice:
    """What is asked, and the answers that there are to choose from."""

    context: str
    """What comes first."""
    question: str
    """What comes between it and each choice, or nothing."""
    choices: tuple[str, ...]
    right: int | None
    """The place of the one that is right, counted from 0; None where nothing is known."""


def choice_of(row: Row, *, labelled: bool = True) -> Choice:
    """A row with its choices.

    Args:
        row: with ``question``, ``context`` or both; ``choices``, a list of texts, or ``ending0``, ``ending1``, ...;
            and ``answer``: a place counted from 0, a letter from A on, or the text of the choice.
        labelled: whether it must have an answer; without, it is not looked at.

    Raises:
        DataError: a column is missing or of another kind, or the answer is none of the choices, or could be two.
    """
    given = [column for column in (CONTEXT, QUESTION) if row.values.get(column) is not None]
    texts = [text_of(row, column) for column in given or [QUESTION]]
    if not any(text.strip() for text in texts):
        raise DataError(f"{row.origin} has an empty {listed(given)}; expected text that the choices answer or end.")
    choices, names = _choices(row)
    if len(choices) < 2:
        raise DataError(f"{row.origin} has {len(choices)} choices; expected at least two.")
    for text in choices:
        text_of(Row(row.origin, {CHOICES: text}), CHOICES)
        if not text.strip():
            raise DataError(f"{row.origin} has a choice without text; expected text in each.")
    right = _right(row, choices, names) if labelled else None
    return Choice(texts[0], "".join(texts[1:]), tuple(choices), right)


def _choices(row: Row) -> tuple[list[Any], list[str]]:
    """The choices, and what each is called in answers."""
    value = row.values.get(CHOICES)
    if value is None:
        return _endings(row)
    if isinstance(value, str):
        # A CSV cell can hold a list only as JSON.
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    names: Any = None
    if isinstance(value, Mapping):
        # As ARC and CommonsenseQA have them: texts with a name for each.
        names, value = value.get("label"), value.get("text")
    if not isinstance(value, list):
        raise DataError(f"{row.origin} has {CHOICES} = {_short(row.values[CHOICES])}; expected a list of texts.")
    if names is not None and (not isinstance(names, list) or len(names) != len(value)):
        raise DataError(
            f"{row.origin} has {len(value)} texts in {CHOICES} and labels {_short(names)}; expected one each."
        )
    return value, [str(name) for name in names or LETTERS[: len(value)]]


def _endings(row: Row) -> tuple[list[Any], list[str]]:
    # The cells of choices that a row does not have are empty in CSV.
    filled = [column for column in ENDINGS if row.values.get(column) not in (None, "")]
    if not filled:
        have = list(map(str, row.values))
        raise DataError(
            f"{row.origin} has no {CHOICES}, and no {ENDINGS[0]}, {ENDINGS[1]}, ...; its columns are "
            f"{listed(have) or 'none'}.{nearest(CHOICES, have, most=1)}"
        )
    missing = next((column for column, found in zip(ENDINGS, filled, strict=False) if column != found), None)
    if missing is not None:
        raise DataError(f"{row.origin} has no {missing}, and has {filled[-1]}; expected every one before it.")
    return [row.values[column] for column in filled], list(LETTERS[: len(filled)])


def _right(row: Row, choices: Sequence[str], names: Sequence[str]) -> int:
    value = row.values.get(ANSWER)
    if value is None or value == "":
        have = list(map(str, row.values))
        raise DataError(
            f"{row.origin} has no {ANSWER}; its columns are {listed(have)}."
            f"{nearest(ANSWER, have, most=1) if ANSWER not in have else ''}"
        )
    if isinstance(value, int) and not isinstance(value, bool):
        found = {value} if 0 <= value < len(choices) else set()
    elif isinstance(value, str):
        found = {at for at, text in enumerate(choices) if text == value}
        if len(found) > 1:
            raise DataError(f"{row.origin} has the answer {_short(value)}, which is the text of {len(found)} choices.")
        found |= {at for at, name in enumerate(names) if name == value}
        # Where choices have names of their own, as 1 to 4, a number is one of these.
        if value.isdecimal() and value not in names and int(value) < len(choices):
            found.add(int(value))
    else:
        found = set()
    if len(found) > 1:
        which = " and ".join(repr(choices[at]) for at in sorted(found))
        raise DataError(
            f"{row.origin} has {ANSWER} = {_short(value)}, which could mean {which}: the text of one, and the place or "
            "name of another; give a letter, or the text of a choice that is no number."
        )
    if not found:
        raise DataError(
            f"{row.origin} has {ANSWER} = {_short(value)}, none of its {len(choices)} choices; expected a place from 0 "
            f"to {len(choices) - 1}, one of {listed(names)}, or the text of one.{nearest(str(value), choices)}"
        )
    return found.pop()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def encode_choices(
    rows: Sequence[Row],
    asked: Sequence[Choice],
    tokenizer: PreTrainedTokenizerBase,
    *,
    likelihood: bool,
    max_length: int,
    truncate: Truncation,
) -> EncodedSet:
    """Each row as one example: the sequences of its choices, one behind the other.

    ``more`` has how many tokens each sequence has, and the texts of the choices; with ``likelihood`` how many of its
    last tokens are the choice's.

    Args:
        rows: where they come from.
        asked: of each row.
        tokenizer: the model's.
        likelihood: whether a choice is to be what a language model goes on with.
        max_length: the most tokens of a sequence.
        truncate: what becomes of a longer one; of what a language model is given, the choice is never cut.

    Raises:
        DataError: a choice that leaves no room for what comes before it; with "fail", a sequence that is too long.
    """
    examples: list[Encoded] = []
    cut: list[int] = []
    dropped = 0
    for row, one in zip(rows, asked, strict=True):
        encode = _continued if likelihood else _paired
        found = encode(row, one, tokenizer, max_length, truncate)
        if found.report.dropped:
            dropped += 1
            continue
        if found.report.truncated:
            cut.append(found.report.tokens_cut)
        parts = found.examples
        more: dict[str, Any] = {"sizes": [len(part.input_ids) for part in parts], "choices": list(one.choices)}
        for name in ("token_type_ids", "scored"):
            values = [part.more[name] for part in parts if name in part.more]
            if values:
                more[name] = [number for each in values for number in each]
        ids = [number for part in parts for number in part.input_ids]
        examples.append(Encoded(row.origin, ids, [] if one.right is None else [one.right], more))
    return EncodedSet(tuple(examples), report(rows, examples, cut=cut, dropped=dropped))


def _paired(row: Row, one: Choice, tokenizer: Any, max_length: int, truncate: Truncation) -> EncodedSet:
    texts = [(one.context, f"{one.question} {choice}" if one.question else choice) for choice in one.choices]
    return encode_texts(
        [row] * len(texts), texts, tokenizer, lambda *_: ([], {}), max_length=max_length, truncate=truncate
    )


def _continued(row: Row, one: Choice, tokenizer: Any, max_length: int, truncate: Truncation) -> EncodedSet:
    before = f"{one.context} {one.question}" if one.question else one.context
    given = list(tokenizer(before)["input_ids"])
    examples: list[Encoded] = []
    cut = []
    for choice in one.choices:
        ids = list(tokenizer(f"{before} {choice}")["input_ids"])
        # A space belongs to the word behind it, and some tokenizers end every text with a token of its own.
        start = next((at for at, (a, b) in enumerate(zip(given, ids, strict=False)) if a != b), len(given))
        over = len(ids) - max_length
        if over > 0 and truncate == "fail":
            raise DataError(
                f"{row.origin} has {len(ids):,} tokens with the choice {_short(choice)}, and at most {max_length:,} "
                "are taken; raise max_length, or let truncate be end, start or drop."
            )
        if over > 0 and truncate == "drop":
            return EncodedSet((), report([row], [], cut=[], dropped=1))
        if start - max(0, over) < 1 or start == len(ids):
            raise DataError(
                f"{row.origin} has {start:,} tokens before the {len(ids) - start:,} of the choice {_short(choice)}, "
                f"and at most {max_length:,} are taken of both; expected at least one of each."
            )
        if over > 0:
            cut.append(over)
            ids = ids[over:] if truncate == "start" else [*ids[: start - over], *ids[start:]]
            start -= over
        examples.append(Encoded(row.origin, ids, [], {"scored": [len(ids) - start]}))
    return EncodedSet(tuple(examples), report([row], examples, cut=cut, dropped=0))
