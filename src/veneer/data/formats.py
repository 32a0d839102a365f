"""Which kind of example a row is, told by its columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from veneer.core.errors import DataError, listed, nearest
from veneer.data.sources import Row

EXPECTED = "messages, prompt + completion, instruction (+ input) + output, or text"
_COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")

Kind = Literal["chat", "pair", "text"]


@dataclass(frozen=True)
class Sample:
    """A row, understood."""

    origin: str
    """Where the row stands."""
    kind: Kind
    """A conversation with roles, a prompt with its completion, or plain text."""
    messages: tuple[dict[str, Any], ...] = ()
    """The turns of a chat or pair, with ``role`` and ``content``; answers have the role "assistant"."""
    text: str = ""
    """The text of a plain text."""


def recognise(rows: Sequence[Row]) -> list[Sample]:
    """Each row as a sample. Of several sets of columns the first of ``EXPECTED`` counts; others are ignored.

    Raises:
        DataError: a row without its columns, or with a value that is not of the right type.
    """
    return [_sample(row) for row in rows]


def _sample(row: Row) -> Sample:
    values = row.values
    if "messages" in values:
        return Sample(row.origin, "chat", _messages(row))
    if "prompt" in values and "completion" in values:
        return Sample(row.origin, "pair", _pair(_text(row, "prompt"), _text(row, "completion")))
    if "instruction" in values and "output" in values:
        more = _text(row, "input") if values.get("input") is not None else ""
        request = _text(row, "instruction")
        return Sample(row.origin, "chat", _pair(f"{request}\n\n{more}" if more else request, _text(row, "output")))
    if "text" in values:
        return Sample(row.origin, "text", text=_text(row, "text"))
    found = [str(column) for column in values]
    hints = [nearest(column, _COLUMNS, most=1) for column in found if column not in _COLUMNS]
    raise DataError(
        f"{row.origin} has the columns {listed(found) or 'none'}; expected {EXPECTED}.{next(filter(None, hints), '')}"
    )


def _pair(request: str, answer: str) -> tuple[dict[str, Any], ...]:
    return {"role": "user", "content": request}, {"role": "assistant", "content": answer}


def _text(row: Row, column: str) -> str:
    return _checked(row.origin, column, row.values[column])


def _checked(origin: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin} has {name} = {_short(value)}; expected text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{origin} has half a character (a lone surrogate) in {name}; expected whole text.") from None
    return value


def _messages(row: Row) -> tuple[dict[str, Any], ...]:
    messages = row.values["messages"]
    if isinstance(messages, str):
        # A CSV cell can hold a list only as JSON.
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError:
            raise DataError(f"{row.origin} has messages = {_short(messages)}; expected a JSON list.") from None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.origin} has messages = {_short(messages)}; expected a list of turns.")
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise DataError(f"{row.origin} has {_short(message)} as message {number}; expected role and content.")
        for key in ("role", "content"):
            _checked(row.origin, f"{key} of message {number}", message[key])
        # Parquet fills the fields that a turn does not have with nothing; templates test for their presence.
        turns.append({key: value for key, value in message.items() if value is not None})
    return tuple(turns)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
