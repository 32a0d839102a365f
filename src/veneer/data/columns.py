"""Columns of other names: ``--columns instruction=question,output=answer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.core.errors import ConfigError, DataError, listed, nearest
from veneer.data.formats import COLUMNS
from veneer.data.rows import Row


def parsed(text: str, known: Sequence[str] = COLUMNS) -> dict[str, str]:
    """From the name that is understood to the name that the data has.

    >>> parsed("instruction=question,output=answer")
    {'instruction': 'question', 'output': 'answer'}

    Raises:
        ConfigError: it is not of that form, or a name that is not in ``known``.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        name, sign, column = (word.strip() for word in part.partition("="))
        if not (name and sign and column):
            raise ConfigError(f"columns is {text!r}; expected pairs as in instruction=question,output=answer.")
        if name not in known:
            raise ConfigError(f"columns has {name!r}; expected one of: {listed(known)}.{nearest(name, known)}")
        found[name] = column
    return found


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """A row with the columns under the names that are understood; all others stay.

    Raises:
        DataError: a column that is named is not there; the nearest of the row's own is shown.
    """
    missing = [column for column in columns.values() if column not in row.values]
    if missing:
        have = list(map(str, row.values))
        raise DataError(f"{row.origin} has no column {missing[0]!r}; it has {listed(have)}.{nearest(missing[0], have)}")
    taken = set(columns.values())
    others = {name: value for name, value in row.values.items() if name not in taken}
    return Row(row.origin, {**others, **{name: row.values[column] for name, column in columns.items()}}, row.folder)
