"""Command-line flags made from the fields of a config class, so that a default and its help have one home.

>>> @adapter_options
... def inspect(model: str, *, adapter_values: dict) -> None:
...     config = adapter_config(adapter_values)
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from veneer.cli.flags import show_flags
from veneer.core.config import TunerConfig
from veneer.core.errors import ConfigError
from veneer.train.config import RunConfig
from veneer.train.families import AdapterField, adapter_fields

PANEL = "Adapter"
"""The heading that the generated flags stand under in the help."""

_REGEX_SIGNS = re.compile(r"[\\*+?\[\](){}|^$]")


def adapter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag for each adapter field to a typer command.

    The command must have a keyword ``adapter_values``; it gets a dict with the fields whose flag was given,
    their values read as the field's type.
    """
    added = [_parameter(field) for field in adapter_fields().values()]

    @functools.wraps(command)
    def with_fields(**given: Any) -> Any:
        texts = {name: given.pop(name, None) for name in adapter_fields()}
        return command(**given, adapter_values=adapter_values(texts))

    show_flags(with_fields, command, added, instead_of="adapter_values")
    return with_fields


def adapter_values(texts: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the flags that were given, keyed by field.

    Args:
        texts: from field name to what the command line held: None or an empty list when the flag is absent.

    Raises:
        ConfigError: a text that the field cannot mean.
    """
    hints = {name: field.hint for name, field in adapter_fields().items()}
    return {name: _read(name, given, hints[name]) for name, given in texts.items() if given is not None and given != []}


def adapter_config(values: Mapping[str, Any], **more: Any) -> TunerConfig:
    """The config that the flags describe, of the family that they name; a field that is not given has its default.

    Raises:
        ConfigError: a bad value or combination.
    """
    return dataclasses.replace(RunConfig(output=".", **values).adapter(), **more)


def _parameter(field: AdapterField) -> inspect.Parameter:
    """The typer parameter of one field, absent by default."""
    hint = field.hint
    flag = f"--{field.name.replace('_', '-')}"
    options: dict[str, Any] = {
        "help": field.docs.replace("[", "\\[") + _shown_default(field),
        "rich_help_panel": PANEL,
    }
    annotation: Any
    if hint is bool:
        annotation = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **options)]
    elif _is_collection(hint):
        annotation = Annotated[list[str] | None, typer.Option(flag, metavar=_metavar(hint), **options)]
    else:
        annotation = Annotated[str | None, typer.Option(flag, metavar=_metavar(hint), **options)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shown_default(field: AdapterField) -> str:
    """The default for the help. It is not the flag's own default, so that absent flags can be told apart."""
    shown = field.shown_default()
    return f" [dim]\\[default: {shown}][/]" if shown else ""


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union without None; the type itself otherwise."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(part for part in parts if part is not type(None))


def _is_collection(hint: Any) -> bool:
    return any(get_origin(part) in (list, dict) for part in _alternatives(hint))


def _metavar(hint: Any) -> str:
    parts = _alternatives(hint)
    if get_origin(parts[0]) is Literal:
        return "|".join(map(str, get_args(parts[0])))
    if get_origin(parts[0]) is dict:
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        return "|".join(["NAME=VALUE,..." if get_args(parts[0])[1] is Any else "NAME=NUMBER,...", *words])
    if get_origin(parts[0]) is list:
        of = get_args(parts[0])
        return "START-END,..." if of == (list[int],) else "NUMBER,..." if of == (int,) else "NAME,..."
    if bool in parts:
        return "true|false|NAME"
    return "NUMBER"


def _read(name: str, given: Any, hint: Any) -> Any:
    """One flag's value in the field's type."""
    if isinstance(given, bool):
        return given
    texts = [given] if isinstance(given, str) else list(given)
    parts = _alternatives(hint)
    if get_origin(parts[0]) is Literal:
        return texts[0]
    if get_origin(parts[0]) is dict:
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        if texts[0] in words:
            return texts[0]
        return _mapping(name, texts, _value if get_args(parts[0])[1] is Any else _any_number)
    if get_origin(parts[0]) is list:
        if len(texts) == 1 and texts[0].lstrip().startswith("{") and any(get_origin(part) is dict for part in parts):
            return _mapping(name, texts)
        if get_args(parts[0]) == (list[int],):
            return [_range(name, item) for item in _items(texts)]
        if get_args(parts[0]) == (int,):
            return [_number(name, item, whole=True) for item in _items(texts)]
        return _names(texts, regex_allowed=str in parts)
    if bool in parts:
        return {"true": True, "false": False}.get(texts[0].lower(), texts[0])
    return _number(name, texts[0], whole=parts == (int,))


def _items(texts: Sequence[str]) -> list[str]:
    return [item.strip() for text in texts for item in text.split(",") if item.strip()]


def _range(name: str, text: str) -> list[int]:
    start, dash, end = text.partition("-")
    if not dash or not start.strip().isdecimal() or not end.strip().isdecimal():
        raise ConfigError(f"--{name.replace('_', '-')} has {text!r}; expected START-END, two whole numbers.")
    return [int(start), int(end)]


def _names(texts: Sequence[str], *, regex_allowed: bool) -> list[str] | str:
    """A list of names; "all-linear" and a single text with signs of a regular expression stay one text."""
    if regex_allowed and len(texts) == 1 and (texts[0].lower() == "all-linear" or _REGEX_SIGNS.search(texts[0])):
        return texts[0]
    return _items(texts)


def _number(name: str, text: str, *, whole: bool) -> int | float:
    try:
        return int(text) if whole or re.fullmatch(r"[+-]?\d+", text.strip()) else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"--{name.replace('_', '-')} is {text!r}; expected {kind}.") from None


def _value(name: str, text: str) -> Any:
    """A number, true, false or null, or else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _any_number(name: str, text: str) -> int | float:
    return _number(name, text, whole=False)


def _mapping(name: str, texts: Sequence[str], read: Callable[[str, str], Any] = _any_number) -> dict[str, Any]:
    """``name=4,other=8``, repeated flags, or one JSON object."""
    flag = f"--{name.replace('_', '-')}"
    if len(texts) == 1 and texts[0].lstrip().startswith("{"):
        try:
            values = json.loads(texts[0])
        except json.JSONDecodeError as error:
            raise ConfigError(f"{flag} is {texts[0]!r}, which is not readable as JSON: {error}.") from None
        return dict(values)
    found: dict[str, Any] = {}
    for item in _items(texts):
        key, equals, value = item.rpartition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} has {item!r}; expected name=number, or one JSON object for all.")
        found[key] = read(name, value)
    return found
