"""Files that rows name, as images and sounds: where they are, and what is in them."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.core.errors import DataError, listed, nearest
from veneer.data.rows import Row

_IN_ROW = "data:;base64,"
"""What begins the name of a file whose content stands in the row itself, as in Parquet."""


def file_of(row: Row, columns: Sequence[str], made: Callable[[Any], bytes | None]) -> str:
    """The file in the first of some columns that a row has, as ``content`` reads it.

    A value is the name of a file, a dict with its ``bytes`` or its ``path`` as ``datasets`` stores it, or what ``made``
    understands. A relative name counts from the folder of the data file (of a program's own rows: from the working
    folder) and may not lead out of it; an absolute one is taken as it is. Nothing is fetched from the network.

    Args:
        row: where it is named.
        columns: those that may hold it.
        made: from an object in memory to the content of a file; None where it is no such object.

    Raises:
        DataError: no such column, or no such file.
    """
    column = next((name for name in columns if row.values.get(name) is not None), None)
    if column is None:
        have = list(map(str, row.values))
        raise DataError(
            f"{row.origin} has no {columns[0]}; its columns are {listed(have) or 'none'}."
            f"{nearest(columns[0], have, most=1)}"
        )
    value = row.values[column]
    found = made(value)
    if found is None and isinstance(value, Mapping):
        found, value = value.get("bytes"), value.get("path")
    if isinstance(found, bytes):
        return _IN_ROW + base64.b64encode(found).decode()
    if isinstance(value, str | os.PathLike) and str(value):
        return _path(row, column, str(value))
    shown = repr(row.values[column])
    raise DataError(
        f"{row.origin} has {column} = {shown[:57]}{'...' * (len(shown) > 57)}; expected the name of a file, or its "
        "bytes as datasets stores them."
    )


def content(file: str) -> bytes:
    """What is in a file that ``file_of`` found.

    Raises:
        OSError: it is gone, or cannot be read.
    """
    return base64.b64decode(file.removeprefix(_IN_ROW)) if in_row(file) else Path(file).read_bytes()


def known(row: Row, file: str) -> tuple[bytes, dict[str, str]]:
    """What is in a file, and what an example keeps of it: where it is, and a hash of its content.

    Raises:
        DataError: it cannot be read.
    """
    try:
        found = content(file)
    except OSError as error:
        raise DataError(f"{row.origin} names {file}, which cannot be read: {error.strerror or error}.") from None
    return found, {"file": file, "sha256": hashlib.sha256(found).hexdigest()}


def in_row(file: str) -> bool:
    """Whether the content stands in the row itself."""
    return file.startswith(_IN_ROW)


def named(file: str) -> str:
    """What to call a file in a sentence."""
    return "the file in the row" if in_row(file) else repr(file)


def _path(row: Row, column: str, name: str) -> str:
    if "://" in name:
        raise DataError(f"{row.origin} has {column} = {name!r}; expected a file: nothing is fetched from the network.")
    folder = (row.folder or Path()).absolute()
    path = Path(os.path.normpath(folder / name))
    if not Path(name).is_absolute() and not path.is_relative_to(os.path.normpath(folder)):
        raise DataError(
            f"{row.origin} has {column} = {name!r}, which leads out of {str(folder)!r}; expected a file in there, or "
            "an absolute name."
        )
    if not path.is_file():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{row.origin} has {column} = {name!r}: no file {str(path)!r}.{nearest(path.name, beside)}")
    return str(path)
