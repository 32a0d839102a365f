"""Command-line flags made from the fields of ``RunConfig``; those of the adapter are in ``fields``."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from veneer.cli.flags import show_flags
from veneer.train.config import LEARNING_RATES, RunConfig
from veneer.train.families import adapter_fields

PANEL = "Run"
"""The heading that the generated flags stand under in the help."""

_NONE = ("none", "null")


def run_fields(*names: str) -> dict[str, FieldInfo]:
    """The fields of ``RunConfig`` without the adapter's; those called ``names`` when any are given."""
    adapter = set(adapter_fields())
    own = {name: field for name, field in RunConfig.model_fields.items() if name not in adapter}
    return {name: own[name] for name in names or own}


def run_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds a flag for each of these fields (all without names) to a typer command.

    The command must have a keyword ``run_values``; it gets a dict with the fields whose flag was given, as the
    texts that were given: ``RunConfig`` reads and checks them.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        fields = run_fields(*names)
        added = [_parameter(name, field) for name, field in fields.items()]

        @functools.wraps(command)
        def with_fields(**given: Any) -> Any:
            texts = {name: given.pop(name, None) for name in fields}
            values = {name: _read(fields[name], text) for name, text in texts.items() if text not in (None, [])}
            return command(**given, run_values=values)

        show_flags(with_fields, command, added, instead_of="run_values")
        return with_fields

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The typer parameter of one field, absent by default, so that it does not override a file."""
    flag = f"--{name.replace('_', '-')}"
    text = f"{(field.description or '').rstrip('.')}.{_shown_default(name, field)}"
    options: dict[str, Any] = {"help": text, "rich_help_panel": PANEL}
    annotation: Any
    if field.annotation is bool:
        annotation = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", **options)]
    else:
        kind = list[str] if _repeats(field) else str
        annotation = Annotated[kind | None, typer.Option(flag, metavar=_metavar(field), **options)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _shown_default(name: str, field: FieldInfo) -> str:
    value: Any = field.default
    if name == "learning_rate":
        value = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
    if field.is_required() or value is None:
        return ""
    return f" [dim]\\[default: {str(value).lower() if isinstance(value, bool) else value}][/]"


def _alternatives(field: FieldInfo) -> tuple[Any, ...]:
    hint: Any = field.annotation
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(part for part in parts if part is not type(None))


def _repeats(field: FieldInfo) -> bool:
    """Whether the flag may be given several times."""
    return any(get_origin(kind) is list for kind in _alternatives(field))


def _metavar(field: FieldInfo) -> str:
    kind = _alternatives(field)[0]
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return {str: "TEXT", int: "NUMBER", float: "NUMBER"}[kind]


def _read(field: FieldInfo, given: Any) -> Any:
    given = given[0] if isinstance(given, list) and len(given) == 1 else given
    optional = type(None) in get_args(field.annotation)
    return None if optional and isinstance(given, str) and given.lower() in _NONE else given
