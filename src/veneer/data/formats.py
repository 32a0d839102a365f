"""Which kind of example a row is, told by its columns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from veneer.core.errors import DataError, listed, nearest
from veneer.data.rows import Row

EXPECTED = "messages, conversations, prompt + completion, instruction (+ input) + output, or text"
COLUMNS = (
    *("messages", "conversations", "system", "tools"),
    *("prompt", "completion", "instruction", "input", "output", "text"),
)
"""Every column that is understood."""

_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **dict.fromkeys(("function_call",), "assistant"),
}
"""From who speaks in ShareGPT's conversations to the role of a chat template."""

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
    tools: tuple[dict[str, Any], ...] = ()
    """The tools that the assistant may call, as the chat template wants them described."""


def recognise(rows: Sequence[Row]) -> list[Sample]:
    """Each row as a sample. Of several sets of columns the first of ``EXPECTED`` counts; others are ignored.

    Raises:
        DataError: a row without its columns, or with a value that is not of the right type.
    """
    return [_sample(row) for row in rows]


def kinds(rows: Iterable[Row]) -> Iterator[Kind]:
    """The kind of each row that is understood."""
    for row in rows:
        with contextlib.suppress(DataError):
            yield question(row)[0].kind


def question(row: Row) -> tuple[Sample, str | None]:
    """What comes before a row's last answer, and that answer, or None where the row has none.

    Of a plain text all is the question.

    Raises:
        DataError: see ``recognise``; an answer may be missing.
    """
    missing = {"prompt": "completion", "instruction": "output"}
    empty = {answer: "?" for asked, answer in missing.items() if asked in row.values and answer not in row.values}
    sample = _sample(Row(row.origin, {**row.values, **empty}))
    if not sample.messages or sample.messages[-1]["role"] != "assistant":
        return sample, None
    asked = replace(sample, messages=sample.messages[:-1])
    return asked, None if empty else str(sample.messages[-1]["content"])


def _sample(row: Row) -> Sample:
    values = row.values
    tools = _tools(row)
    if "messages" in values:
        return Sample(row.origin, "chat", _with_system(row, _messages(row, _listed(row, "messages"))), tools=tools)
    if "conversations" in values:
        return Sample(row.origin, "chat", _with_system(row, _messages(row, _conversation(row))), tools=tools)
    if "prompt" in values and "completion" in values:
        messages = _with_system(row, _pair(_text(row, "prompt"), _filled(row, "completion")))
        return Sample(row.origin, "pair" if len(messages) == 2 else "chat", messages, tools=tools)
    if "instruction" in values and "output" in values:
        more = _text(row, "input") if values.get("input") is not None else ""
        request = _text(row, "instruction")
        pair = _pair(f"{request}\n\n{more}" if more else request, _filled(row, "output"))
        return Sample(row.origin, "chat", _with_system(row, pair), tools=tools)
    if "text" in values:
        return Sample(row.origin, "text", text=_filled(row, "text"))
    found = [str(column) for column in values]
    hints = [nearest(column, COLUMNS, most=1) for column in found if column not in COLUMNS]
    raise DataError(
        f"{row.origin} has the columns {listed(found) or 'none'}; expected {EXPECTED}.{next(filter(None, hints), '')}"
    )


def _with_system(row: Row, messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """A row's ``system`` column before its turns, unless they begin with a system message of their own."""
    if not row.values.get("system") or messages[0]["role"] == "system":
        return messages
    return {"role": "system", "content": _text(row, "system")}, *messages


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    if not row.values.get("tools"):
        return ()
    tools = _listed(row, "tools")
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{row.origin} has tools = {_short(row.values['tools'])}; expected a list of descriptions.")
    return tuple(dict(tool) for tool in tools)


def _conversation(row: Row) -> list[Any]:
    """ShareGPT's turns, with ``from`` and ``value``, as messages."""
    turns: list[Any] = []
    for number, turn in enumerate(_listed(row, "conversations"), start=1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            turns.append(turn)
            continue
        if turn["from"] not in _ROLES:
            raise DataError(
                f"{row.origin} has a turn {number} from {turn['from']!r}; expected {listed(_ROLES, most=20)}."
                f"{nearest(str(turn['from']), _ROLES)}"
            )
        turns.append({"role": _ROLES[turn["from"]], "content": turn["value"]})
    return turns


def _pair(request: str, answer: str) -> tuple[dict[str, Any], ...]:
    return {"role": "user", "content": request}, {"role": "assistant", "content": answer}


def _text(row: Row, column: str) -> str:
    return _checked(row.origin, column, row.values[column])


def _filled(row: Row, column: str) -> str:
    """The text of a column that is there to be learned."""
    text = _text(row, column)
    if not text.strip():
        raise DataError(f"{row.origin} has an empty {column}; expected text to learn.")
    return text


def _checked(origin: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{origin} has {name} = {_short(value)}; expected text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{origin} has half a character (a lone surrogate) in {name}; expected whole text.") from None
    return value


def _listed(row: Row, column: str) -> list[Any]:
    value = row.values[column]
    if isinstance(value, str):
        # A CSV cell can hold a list only as JSON.
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError(f"{row.origin} has {column} = {_short(value)}; expected a JSON list.") from None
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.origin} has {column} = {_short(value)}; expected a list of turns.")
    return value


def _messages(row: Row, messages: list[Any]) -> tuple[dict[str, Any], ...]:
    turns = []
    for number, message in enumerate(messages, start=1):
        # Parquet fills the fields that a turn does not have with nothing; templates test for their presence.
        turn = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
        # An assistant that calls a tool need not say anything.
        if "role" not in turn or not ("content" in turn or turn.get("tool_calls")):
            raise DataError(f"{row.origin} has {_short(message)} as message {number}; expected role and content.")
        for key in ("role", "content") if "content" in turn else ("role",):
            _checked(row.origin, f"{key} of message {number}", turn[key])
        if turn["role"] == "assistant":
            turn = {"content": "", **turn}
            # Calls of tools and thoughts stand in keys of their own.
            if not turn["content"].strip() and not any(turn[key] for key in turn.keys() - {"role", "content", "name"}):
                raise DataError(f"{row.origin} has an empty answer as message {number}; expected text to learn.")
        turns.append(turn)
    return tuple(turns)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
