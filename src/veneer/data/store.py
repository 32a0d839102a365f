"""Encoded examples on disk: flat arrays that are mapped into memory, so that it holds only what is being read.

A store is a folder. ``index.json`` has the counts, the reasons against bad rows and the size of every other file:

- ``input_ids.i4``, ``labels.i4``: the tokens and labels of all examples, one behind the other (int32);
- ``origins.u1``: the names of the rows, one behind the other (UTF-8);
- ``more.u1``: what else a task keeps of each example, one behind the other (JSON, mostly nothing);
- ``examples.i8``: for each example its row, the ends of its tokens, of its labels and of what else there is, and how
  many are trained (int64);
- ``rows.i8``: for each row the end of its name, sequences cut, tokens lost by that, sequences left out, sequences
  dropped, and tokens (int64).

All numbers are little-endian. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
import weakref
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, final, overload

import numpy as np
from numpy.typing import NDArray

from veneer.core.errors import DataError
from veneer.data.encode import Encoded, EncodedSet, EncodingReport
from veneer.data.rows import BadRow, Row

FORMAT = 3
MOST_REASONS = 1000
"""How many reasons against bad rows are kept; all are counted."""
INDEX_NAME = "index.json"

_COLUMNS = {
    "input_ids": "<i4",
    "labels": "<i4",
    "more": "<u1",
    "origins": "<u1",
    "examples": "<i8",
    "rows": "<i8",
}
_WIDTHS = {"examples": 5, "rows": 6}
_ROW, _IDS_END, _LABELS_END, _MORE_END, _TRAINED = range(5)
_ORIGIN_END, _TRUNCATED, _CUT, _LEFT_OUT, _DROPPED, _TOKENS = range(6)

Outcome = tuple[Row, EncodedSet] | BadRow
"""What became of one row."""


@final
@dataclass(frozen=True)
class Chunk:
    """Some rows, encoded, as arrays; the ends count from the chunk's own begin."""

    columns: dict[str, NDArray[Any]]
    bad: list[str]
    """The reasons against bad rows, in the order of these."""


def packed(outcomes: Iterable[Outcome]) -> Chunk:
    """What became of some rows, as arrays."""
    ids, labels = array("i"), array("i")
    origins, more = bytearray(), bytearray()
    examples: list[tuple[int, ...]] = []
    rows: list[tuple[int, ...]] = []
    bad = []
    for outcome in outcomes:
        if isinstance(outcome, BadRow):
            bad.append(outcome.reason)
            continue
        row, found = outcome
        for example in found.examples:
            ids.extend(example.input_ids)
            whole = all(isinstance(label, int) for label in example.labels)
            labels.extend(example.labels if whole else ())
            if example.more or not whole:
                rest = [None if whole else list(example.labels), dict(example.more)]
                more += json.dumps(rest).encode()
            examples.append((len(rows), len(ids), len(labels), len(more), example.trained))
        origins += row.origin.encode("utf-8", "surrogateescape")
        report = found.report
        counts = (report.truncated, report.tokens_cut, report.left_out, report.dropped, report.tokens)
        rows.append((len(origins), *counts))
    columns = {
        "input_ids": np.array(ids, "<i4"),
        "labels": np.array(labels, "<i4"),
        "more": np.frombuffer(bytes(more), "<u1"),
        "origins": np.frombuffer(bytes(origins), "<u1"),
        "examples": np.array(examples, "<i8").reshape(-1, _WIDTHS["examples"]),
        "rows": np.array(rows, "<i8").reshape(-1, _WIDTHS["rows"]),
    }
    return Chunk(columns, bad)


def write_store(folder: Path, chunks: Iterable[Chunk]) -> None:
    """Fill an empty folder with a store, chunk by chunk.

    Raises:
        OSError: the disk is full or not writable.
    """
    files: dict[str, BinaryIO] = {}
    counts = dict.fromkeys(_COLUMNS, 0)
    bad, reasons = 0, []
    try:
        for name, kind in _COLUMNS.items():
            files[name] = (folder / _file(name, kind)).open("wb")
        for chunk in chunks:
            bad += len(chunk.bad)
            reasons += chunk.bad[: MOST_REASONS - len(reasons)]
            columns = dict(chunk.columns)
            shift = [counts["rows"], counts["input_ids"], counts["labels"], counts["more"], 0]
            columns["examples"] = columns["examples"] + np.array(shift, "<i8")
            columns["rows"] = columns["rows"] + np.array([counts["origins"], 0, 0, 0, 0, 0], "<i8")
            for name, column in columns.items():
                files[name].write(column.tobytes())
                counts[name] += len(column)
    finally:
        for stream in files.values():
            stream.close()
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    index = {"format": FORMAT, "bad": bad, "reasons": reasons, "sizes": sizes}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _file(name: str, kind: str) -> str:
    return f"{name}.{kind[1:]}"


@final
class Store:
    """A store that is open for reading.

    Args:
        folder: what ``write_store`` filled.
        temporary: remove the folder when nobody reads from it any more.

    Raises:
        DataError: it is not whole.
    """

    def __init__(self, folder: Path, *, temporary: bool = False) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise DataError(f"{folder} has format {index['format']}; expected {FORMAT}.")
            for name, size in index["sizes"].items():
                if (folder / name).stat().st_size != size:
                    raise DataError(f"{folder / name} has not the size that it was written with, {size:,} bytes.")
            columns = {name: _mapped(folder / _file(name, kind), kind) for name, kind in _COLUMNS.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder} is no store of encoded examples: {error}.") from error
        self.input_ids, self.labels = columns["input_ids"], columns["labels"]
        self.more, self.origins = columns["more"], columns["origins"]
        self.examples = columns["examples"].reshape(-1, _WIDTHS["examples"])
        self.rows = columns["rows"].reshape(-1, _WIDTHS["rows"])
        self.bad: int = index["bad"]
        self.reasons: list[str] = index["reasons"]
        if temporary:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def example(self, at: int) -> Encoded:
        """One example."""
        ends = [_IDS_END, _LABELS_END, _MORE_END]
        starts = map(int, self.examples[at - 1, ends] if at else (0, 0, 0))
        spans = [slice(start, int(end)) for start, end in zip(starts, self.examples[at, ends], strict=True)]
        ids, labels = self.input_ids[spans[0]].tolist(), self.labels[spans[1]].tolist()
        rest = bytes(self.more[spans[2]])
        others, more = json.loads(rest) if rest else (None, {})
        return Encoded(self.origin(int(self.examples[at, _ROW])), ids, labels if others is None else others, more)

    def origin(self, row: int) -> str:
        """Where a row stands."""
        start = int(self.rows[row - 1, _ORIGIN_END]) if row else 0
        return bytes(self.origins[start : int(self.rows[row, _ORIGIN_END])]).decode("utf-8", "surrogateescape")

    def cut(self, rows: NDArray[np.int64] | None = None) -> str | None:
        """The first of these rows (all by default) that is too long, if one is."""
        some = np.arange(len(self.rows)) if rows is None else rows
        over = some[(self.rows[some, _TRUNCATED] + self.rows[some, _DROPPED]) > 0]
        return self.origin(int(over[0])) if len(over) else None

    def set_of(self, rows: NDArray[np.int64] | None = None) -> EncodedSet:
        """The examples of these rows (ascending; all by default), and what became of them."""
        whole = np.arange(len(self.rows)) if rows is None else rows
        chosen = np.arange(len(self.examples))
        if rows is not None:
            marked = np.zeros(len(self.rows), bool)
            marked[rows] = True
            chosen = np.flatnonzero(marked[self.examples[:, _ROW]])
        found = Examples(self, chosen)
        totals = self.rows[whole].sum(axis=0) if len(whole) else np.zeros(_WIDTHS["rows"], "<i8")
        report = EncodingReport(
            rows=len(whole),
            examples=len(chosen),
            truncated=int(totals[_TRUNCATED]),
            tokens_cut=int(totals[_CUT]),
            left_out=int(totals[_LEFT_OUT]),
            # As the task counts them: an encoder-decoder's are those it reads and those it writes.
            tokens=int(totals[_TOKENS]),
            trained_tokens=int(self.examples[chosen, _TRAINED].sum()),
            longest=max(found.lengths, default=0),
            dropped=int(totals[_DROPPED]),
        )
        return EncodedSet(found, report, found.lengths)


def _mapped(path: Path, kind: str) -> NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)


@final
class Examples(Sequence[Encoded]):
    """Examples of a store, read from it when they are asked for."""

    def __init__(self, store: Store, chosen: NDArray[np.int64]) -> None:
        self.store, self.chosen = store, chosen
        ends = store.examples[:, _IDS_END]
        self.lengths = array("q", np.diff(ends, prepend=0)[chosen].tobytes())
        """Tokens of each example."""

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> Encoded: ...

    @overload
    def __getitem__(self, at: slice) -> Self: ...

    def __getitem__(self, at: int | slice) -> Encoded | Examples:
        if isinstance(at, slice):
            return Examples(self.store, self.chosen[at])
        return self.store.example(int(self.chosen[at]))
