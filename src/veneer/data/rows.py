"""One example as it came from its source, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from veneer.core.errors import DataError


@final
@dataclass(frozen=True)
class Row:
    """One example as it came."""

    origin: str
    """The file and the line (in Parquet: the row) it starts at, counted from 1."""
    values: Mapping[str, Any]
    """Its columns."""
    folder: Path | None = None
    """What the names of files in it count from; None is the working folder."""


@final
@dataclass(frozen=True)
class BadRow:
    """A place in the data where an example was expected that cannot be read."""

    reason: str
    """Where it is and what is wrong with it, in one sentence."""


def rows_of(examples: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows from examples in memory, named "example 1", "example 2", ...

    Raises:
        DataError: there is none.
    """
    rows = [Row(f"example {number}", values) for number, values in enumerate(examples, start=1)]
    if not rows:
        raise DataError("The list of examples is empty; expected at least one.")
    return rows
