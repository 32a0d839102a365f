"""What a verb shows: tables and text on stdout, progress and warnings on stderr, one JSON document on request.

A verb prints for humans and returns its result; under ``--json`` the main program sends what it prints to
stderr and writes the returned result to stdout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, final

from rich.console import Console

_PIPED_WIDTH = 120


@final
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a verb returns that may fail and still has a result."""

    result: Any
    """What ``--json`` writes."""
    code: int = 0
    """The exit code."""


def console(*, stderr: bool = False) -> Console:
    """A console for humans: colours on a terminal, plain text of a fixed width into a pipe or file."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def plain(value: Any) -> Any:
    """A result as JSON values: records by their fields, paths as text, NaN and infinity as null.

    Raises:
        TypeError: a value that is none of these.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form.")


def write_document(stream: TextIO, value: Any) -> None:
    """One JSON document and a line end."""
    stream.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")
    stream.flush()


def quiet_libraries() -> None:
    """Switch off the bars and notes of libraries that are yet to be imported: they are noise around a verb's own."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def for_humans(*, as_json: bool) -> Iterator[TextIO]:
    """The surroundings of a verb: warnings as one line each on stderr.

    Yields:
        The stream for the JSON document: stdout. Under ``as_json`` everything else that is printed, by a library
        too, goes to stderr.
    """
    document = sys.stdout
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = _show_warning
        if as_json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield document


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning | RuntimeWarning):
        console(stderr=True).print(f"warning: {message}", style="yellow", markup=False)
