"""Rows of one file of JSONL, CSV, text (all also gzipped), Parquet or JSON, each knowing its place: "train.jsonl:17".

All but a list in .json and SQuAD's own JSON is read piece by piece: memory holds one row of a file of any size, of
Parquet one batch. In SQuAD's, the place is the number of the question.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from veneer.core.errors import DataError, UsageError, listed
from veneer.data.rows import BadRow, Row
from veneer.data.squad import is_squad, questions

Read = Iterator[Row | BadRow]


def ending(path: Path) -> str:
    """What tells a file's kind: its suffix, of a gzipped file the one before as well."""
    last = path.suffix.lower()
    return path.with_suffix("").suffix.lower() + last if last == ".gz" else last


def read_file(path: Path, name: str) -> Read:
    """The rows of a file, and a ``BadRow`` for each place that holds none.

    Args:
        path: a file of one of ``KINDS``.
        name: what it is called in the rows' origins, and in the reasons against bad ones.

    Raises:
        UsageError: it cannot be opened.
        DataError: it is not what its ending says.
    """
    for row in READERS[ending(path)](path, name):
        yield Row(row.origin, row.values, path.parent) if isinstance(row, Row) else row


def read_jsonl(path: Path, name: str) -> Read:
    """A row for each line that is not blank. See ``read_file``."""
    for number, line in _lines(path):
        text = _decoded(line)
        if text is None:
            yield BadRow(_not_utf8(name, number, line))
            continue
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            yield BadRow(f"{name}:{number} is not a line of JSON: {reason}; it begins {text[:40]!r}.")
            continue
        if isinstance(values, dict):
            yield Row(f"{name}:{number}", values)
        else:
            yield BadRow(f"{name}:{number} is a JSON {_kind(values)}; expected an object with columns, one a line.")


def _read_text(path: Path, name: str) -> Read:
    for number, line in _lines(path):
        text = _decoded(line)
        if text is None:
            yield BadRow(_not_utf8(name, number, line))
        elif text.strip():
            yield Row(f"{name}:{number}", {"text": text.rstrip("\r\n")})


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line, without the mark that some editors put before the first one."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not readable as gzip: {str(error).rstrip('.')}.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None


def _decoded(line: bytes) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _not_utf8(name: str, number: int, line: bytes) -> str:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {line[error.start]:#04x} at position {error.start + 1} of the line"
        return f"{name}:{number} is not UTF-8: {where}; save the file as UTF-8."
    raise AssertionError


def _kind(value: Any) -> str:
    return type(value).__name__


def _holds_lines(path: Path) -> bool:
    """Whether there is an object in the first of several lines: JSONL is often called .json."""
    lines = (line for _, line in _lines(path) if line.strip())
    first = next(lines, b"")
    try:
        return first.lstrip().startswith(b"{") and isinstance(json.loads(first), dict) and next(lines, None) is not None
    except (ValueError, RecursionError):
        return False


def _read_json(path: Path, name: str) -> Read:
    if _holds_lines(path):
        yield from read_jsonl(path, name)
        return
    content = b"".join(line for _, line in _lines(path))
    try:
        values = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{number} is not UTF-8: byte {content[error.start]:#04x}; save the file as UTF-8."
        ) from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    if is_squad(values):
        for number, question in enumerate(questions(values), start=1):
            yield Row(f"{name}:{number}", question) if isinstance(question, dict) else BadRow(f"{name}: {question}.")
        return
    if not isinstance(values, list):
        raise DataError(f"{path} holds no list of objects; expected [{{...}}, ...] with the columns of each example.")
    for number, item in enumerate(values, start=1):
        if isinstance(item, dict):
            yield Row(f"{name}:{number}", item)
        else:
            yield BadRow(f"{name}:{number} is a JSON {_kind(item)}; expected a list of objects with columns.")


def _read_csv(path: Path, name: str) -> Read:
    # Python's own limit of 128 KiB a field is shorter than many documents.
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield from _csv_rows(path, name)
    except csv.Error as error:
        raise DataError(f"{path} is not readable as CSV: {error}.") from None
    finally:
        csv.field_size_limit(before)


def _csv_rows(path: Path, name: str) -> Read:
    # What is not UTF-8 goes through as half a character, so that the reader can go on behind it.
    reader = csv.reader((line.decode("utf-8", "surrogateescape") for _, line in _lines(path)), strict=True)
    header = next(reader, None)
    if header is None:
        return
    if len(set(header)) != len(header) or not all(header):
        raise DataError(f"{path}:1 has the columns {listed(header)}; expected a name for each, none twice.")
    if (broken := _broken(header)) is not None:
        raise DataError(f"{path}:1 is not UTF-8: byte {broken:#04x}; save the file as UTF-8.")
    start = reader.line_num + 1
    for cells in reader:
        if (broken := _broken(cells)) is not None:
            yield BadRow(f"{name}:{start} is not UTF-8: byte {broken:#04x}; save the file as UTF-8.")
        elif cells and len(cells) != len(header):
            yield BadRow(f"{name}:{start} has {len(cells)} cells; expected {len(header)}: {listed(header)}.")
        elif cells:
            yield Row(f"{name}:{start}", dict(zip(header, cells, strict=True)))
        start = reader.line_num + 1


def _broken(cells: list[str]) -> int | None:
    """The first byte that was not UTF-8, as ``surrogateescape`` left it."""
    for cell in cells:
        if not cell.isascii():
            for char in cell:
                if "\udc80" <= char <= "\udcff":
                    return ord(char) - 0xDC00
    return None


def _read_parquet(path: Path, name: str) -> Read:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"Reading {path} needs pyarrow; install it with: pip install 'veneer[data]'") from None
    try:
        path.open("rb").close()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{name}:{number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not readable as Parquet: {str(error).splitlines()[0]}") from None


READERS: dict[str, Callable[[Path, str], Read]] = {
    ".json": _read_json,
    ".jsonl": read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".ndjson": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json.gz": _read_json,
    ".csv.gz": _read_csv,
    ".txt.gz": _read_text,
}
"""From the ending of a file to how it is read."""

KINDS = ", ".join(READERS)
"""The endings, for messages."""

IN_FOLDERS = READERS.keys() - {".json", ".txt", ".txt.gz"}
"""What is read of a folder: a .json or .txt there mostly says something about the data; it is read when it is named."""
