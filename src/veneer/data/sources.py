"""Rows from a file or folder of JSONL, CSV (both also gzipped) or Parquet, each knowing its place: "train.jsonl:17"."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.core.errors import DataError, UsageError, listed, nearest

TRAIN_NAMES = ("train",)
HELD_OUT_NAMES = ("valid", "validation", "val", "dev", "eval")
TEST_NAMES = ("test",)


@dataclass(frozen=True)
class Row:
    """One example as it came."""

    origin: str
    """The file and the line (in Parquet: the row) it starts at, counted from 1."""
    values: Mapping[str, Any]
    """Its columns."""


def read_rows(path: str | Path | Sequence[Path], *, bad: list[str] | None = None) -> list[Row]:
    """Every row of a file, of a folder's data files in order of their names, or of the listed files.

    Args:
        path: what to read.
        bad: takes the reason against each line of JSONL that cannot be read, instead of failing at the first.

    Raises:
        UsageError: there is no such file, or it is of another kind.
        DataError: a line that cannot be read (named), or no row at all.
    """
    files = data_files(path) if isinstance(path, str | Path) else list(path)
    rows = [row for file in files for row in _READERS[_ending(file)](file, bad)]
    if not rows:
        raise DataError(f"{listed(map(str, files))} holds no rows; expected one example a line.")
    return rows


def rows_of(examples: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows from examples in memory, named "example 1", "example 2", ...

    Raises:
        DataError: there is none.
    """
    rows = [Row(f"example {number}", values) for number, values in enumerate(examples, start=1)]
    if not rows:
        raise DataError("The list of examples is empty; expected at least one.")
    return rows


def data_files(path: str | Path) -> list[Path]:
    """The data files that a path means.

    Raises:
        UsageError: nothing there, or nothing of a known kind.
    """
    place = Path(path).expanduser()
    kinds = ", ".join(_READERS)
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if _ending(file) in _IN_FOLDERS and file.is_file())
        if not files:
            raise UsageError(f"The folder {str(path)!r} has no data files; expected files ending in {kinds}.")
        return files
    if not place.exists():
        beside = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UsageError(f"There is no file or folder {str(path)!r}.{nearest(place.name, beside)}")
    if _ending(place) not in _READERS:
        raise UsageError(f"{str(path)!r} ends in {_ending(place) or 'nothing'!r}; expected one of {kinds}.")
    return [place]


def chosen(files: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The files of a folder that are called by one of ``names``: ``train.jsonl``, ``train-0001.parquet``, ..."""
    return [file for file in files if file.stem.lower().replace("_", "-").split("-")[0].split(".")[0] in names]


def _ending(path: Path) -> str:
    """What tells a file's kind: its suffix, of a gzipped file the one before as well."""
    last = path.suffix.lower()
    return path.with_suffix("").suffix.lower() + last if last == ".gz" else last


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank.

    Raises:
        DataError: a line that is not UTF-8.
    """
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number} is not UTF-8: byte {line[error.start]:#04x} at position {error.start + 1} of "
                    "the line; save the file as UTF-8."
                ) from None
            if text.strip():
                yield number, text


def _open(path: Path) -> Any:
    try:
        if path.suffix.lower() != ".gz":
            return path.open("rb")
        # Whole, as its rows are kept anyway: so a file that is cut short is known before a row of it is used.
        return io.BytesIO(gzip.decompress(path.read_bytes()))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not readable as gzip: {str(error).rstrip('.')}.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_jsonl(path: Path, bad: list[str] | None) -> Iterator[Row]:
    for number, text in _lines(path):
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            _refuse(f"{path}:{number} is not a line of JSON: {reason}; it begins {text[:40]!r}.", bad)
            continue
        if not isinstance(values, dict):
            kind = type(values).__name__
            _refuse(f"{path}:{number} is a JSON {kind}; expected an object with columns, one a line.", bad)
            continue
        yield Row(f"{path.name}:{number}", values)


def _refuse(reason: str, bad: list[str] | None) -> None:
    if bad is None:
        raise DataError(reason)
    bad.append(reason)


def _read_json(path: Path, bad: list[str] | None) -> Iterator[Row]:
    with _open(path) as stream:
        text = _decoded(path, stream.read())
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
    if not isinstance(values, list) or not all(isinstance(item, dict) for item in values):
        raise DataError(f"{path} holds no list of objects; expected [{{...}}, ...] with the columns of each example.")
    for number, item in enumerate(values, start=1):
        yield Row(f"{path.name}:{number}", item)


def _read_csv(path: Path, bad: list[str] | None) -> Iterator[Row]:
    # Python's own limit of 128 KiB a field is shorter than many documents.
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield from _csv_rows(path)
    except csv.Error as error:
        raise DataError(f"{path} is not readable as CSV: {error}.") from None
    finally:
        csv.field_size_limit(before)


def _csv_rows(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        text = _decoded(path, stream.read())
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    header = next(reader, None)
    if header is None:
        return
    if len(set(header)) != len(header) or not all(header):
        raise DataError(f"{path}:1 has the columns {listed(header)}; expected a name for each, none twice.")
    start = reader.line_num + 1
    for cells in reader:
        if cells and len(cells) != len(header):
            raise DataError(f"{path}:{start} has {len(cells)} cells; expected {len(header)}: {listed(header)}.")
        if cells:
            yield Row(f"{path.name}:{start}", dict(zip(header, cells, strict=True)))
        start = reader.line_num + 1


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{number} is not UTF-8: byte {content[error.start]:#04x}; save the file as UTF-8."
        ) from None


def _read_parquet(path: Path, bad: list[str] | None) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"Reading {path} needs pyarrow; install it with: pip install 'veneer[data]'") from None
    with _open(path):
        pass
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path.name}:{number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not readable as Parquet: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path, list[str] | None], Iterator[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".jsonl.gz": _read_jsonl,
    ".csv.gz": _read_csv,
}

_IN_FOLDERS = _READERS.keys() - {".json"}
"""What is read of a folder: a .json there mostly says something about the data, and is read when it is named."""
