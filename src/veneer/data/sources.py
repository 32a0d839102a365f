"""What stands behind the name of some data: files, a folder or pattern of them, stdin, a saved data set, a hub name.

Images and sounds are data files too, of one row each; so is a folder of them.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from veneer.core.errors import DataError, UsageError, listed, nearest
from veneer.data import arrow, folders
from veneer.data.files import IN_FOLDERS, KINDS, READERS, Read, ending, read_file, read_jsonl
from veneer.data.rows import BadRow, Row, rows_of

__all__ = [
    "HELD_OUT_NAMES",
    "IN_MEMORY",
    "STDIN",
    "TEST_NAMES",
    "TRAIN_NAMES",
    "Row",
    "Source",
    "chosen",
    "read_rows",
    "rows_of",
]

TRAIN_NAMES = ("train",)
HELD_OUT_NAMES = ("valid", "validation", "val", "dev", "eval")
TEST_NAMES = ("test",)
STDIN = "-"
"""The name of what is written to the program: JSONL."""
IN_MEMORY = "examples"
"""The place of what a program hands over."""


@final
@dataclass(frozen=True)
class Source:
    """One file or split, which can be read any number of times."""

    place: str
    """Its path, or its place on the hub."""
    name: str
    """What it is called in the origins of its rows."""
    words: tuple[str, ...]
    """What may tell what it is for, as train does: the first word of its name, and of the folder it was found in."""
    reader: Callable[[str], Read]
    """Reads it; it is given the name."""
    digest: Callable[[], str | None]
    """A hash of its content; None when it has no place to be read from again."""

    def read(self) -> Read:
        """Its rows in their order, and a ``BadRow`` for each place that holds none."""
        return self.reader(self.name)


Given = str | Path | Sequence[str | Path | Source]
"""One name of data or several; a source stands for itself."""


def read_rows(given: Given, *, bad: list[str] | None = None) -> list[Row]:
    """Every row of the data, in memory.

    Args:
        given: see ``sources``.
        bad: takes the reason against each row that cannot be read, instead of failing at the first.

    Raises:
        UsageError: there is no such data.
        DataError: a row that cannot be read (named), or no row at all.
    """
    found = sources(given)
    rows = []
    for row in (row for source in found for row in source.read()):
        if isinstance(row, Row):
            rows.append(row)
        elif bad is None:
            raise DataError(row.reason)
        else:
            bad.append(row.reason)
    if not rows:
        raise DataError(no_rows(found))
    return rows


def no_rows(found: Sequence[Source]) -> str:
    """A sentence for data without a single row."""
    return f"{listed(source.place for source in found)} holds no rows; expected one example a line."


def sources(given: Given) -> list[Source]:
    """What stands behind names of data, in the order in which they are given, nothing twice.

    A name is a file of a known kind; a folder of them, read in the order of their names; a pattern such as
    ``shards/*.jsonl``; a folder that ``datasets`` saved; ``-`` for JSONL on stdin; or a data set on the hub.

    Raises:
        UsageError: nothing there, or nothing of a known kind.
    """
    names = [given] if isinstance(given, str | Path) else list(given)
    found: dict[str, Source] = {}
    for name in names:
        for source in [name] if isinstance(name, Source) else _behind(str(name)):
            found.setdefault(source.place, source)
    taken = Counter(source.name for source in found.values())
    return [replace(s, name=s.place) if taken[s.name] > 1 else s for s in found.values()]


def in_memory(examples: Iterable[Mapping[str, Any]]) -> Source:
    """Examples that a program gives: a list, a data set of ``datasets``, or whatever can be gone through.

    Only what can be gone through once alone is copied into memory.

    Raises:
        DataError: there is none.
    """
    kept = list(examples) if isinstance(examples, Iterator) else examples
    if next(iter(kept), None) is None:
        raise DataError("The list of examples is empty; expected at least one.")

    def read(name: str) -> Read:
        for number, values in enumerate(kept, start=1):
            if isinstance(values, Mapping):
                yield Row(f"{name} {number}", values)
            else:
                yield BadRow(f"{name} {number} is a {type(values).__name__}; expected a mapping with columns.")

    return Source(IN_MEMORY, "example", (IN_MEMORY,), read, lambda: None)


def chosen(found: Sequence[Source], names: Sequence[str]) -> list[Source]:
    """Those that are called by one of ``names``: ``train.jsonl``, ``train-0001.parquet``, ``train/a.csv``, ..."""
    return [source for source in found if next(filter(_is_known, source.words), source.words[0]) in names]


def _is_known(word: str) -> bool:
    return word in {*TRAIN_NAMES, *HELD_OUT_NAMES, *TEST_NAMES}


def _is_train(name: str) -> bool:
    return _first_word(name) in TRAIN_NAMES


def _behind(name: str) -> list[Source]:
    if name == STDIN:
        return [_stdin()]
    place = Path(name).expanduser()
    if place.is_dir():
        return _folder(place)
    if place.exists():
        return [_file(place)]
    if glob.has_magic(name):
        return _pattern(name, place)
    beside = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
    missing = f"There is no file or folder {name!r}"
    if ending(place) in READERS or not arrow.may_be_on_hub(name):
        raise UsageError(f"{missing}.{nearest(place.name, beside)}")
    try:
        splits = arrow.hub_sets(name)
    except UsageError as error:
        raise UsageError(f"{missing}, and {str(error).rstrip('.')}.{nearest(place.name, beside)}") from error
    return _splits(splits, name)


def _file(path: Path, *above: str) -> Source:
    if not _is_read(path):
        raise UsageError(f"{str(path)!r} ends in {ending(path) or 'nothing'!r}; expected one of {KINDS}.")
    reader = read_file if ending(path) in READERS else folders.read_single
    words = tuple(map(_first_word, (path.name, *above)))
    return Source(str(path), path.name, words, functools.partial(reader, path), functools.partial(_hash, path))


def _is_read(path: Path) -> bool:
    return ending(path) in READERS or folders.kind(path) is not None


def _folder(folder: Path) -> list[Source]:
    if arrow.is_saved(folder):
        return _splits(arrow.saved_sets(folder), str(folder))
    for pattern in ("*", "*/*"):
        within = [(file, file.relative_to(folder).parts) for file in sorted(folder.glob(pattern))]
        # Hidden ones are editors' and systems' own.
        seen = [(file, parts) for file, parts in within if not any(part.startswith(".") for part in parts)]
        files = [(file, parts) for file, parts in seen if ending(file) in IN_FOLDERS and file.is_file()]
        if files:
            return [_file(file, *parts[:-1]) for file, parts in files]
    places = folders.splits(folder, lambda name: _is_known(_first_word(name)), _is_train)
    if places:
        return [_media(place) for place in places]
    raise UsageError(
        f"The folder {str(folder)!r} has no data files; expected files ending in {', '.join(sorted(IN_FOLDERS))}. "
        f"Others are read when they are named, as in {str(folder / '*.txt')!r}."
    )


def _pattern(name: str, place: Path) -> list[Source]:
    found = [Path(path) for path in sorted(glob.glob(str(place), recursive=True))]
    files = [path for path in found if path.is_file() and _is_read(path)]
    if not files:
        raise UsageError(f"No file matches {name!r}; expected files ending in {KINDS}.")
    return [_file(path) for path in files]


def _media(folder: Path) -> Source:
    """A folder of images or sounds. What names files is never kept, so it needs no hash."""
    name = folder.name or str(folder)
    reader = functools.partial(folders.read_folder, folder)
    return Source(str(folder), name, (_first_word(name),), reader, lambda: None)


def _splits(splits: Mapping[str, Any], name: str) -> list[Source]:
    single = len(splits) == 1
    return [
        Source(
            name if single else f"{name}[{split}]",
            Path(name).name if single else f"{Path(name).name}[{split}]",
            (_first_word(split),),
            functools.partial(arrow.read_set, rows),
            functools.partial(arrow.digest, rows),
        )
        for split, rows in splits.items()
    ]


def _stdin() -> Source:
    """Standard input in a file of its own, so that it can be read again; the file goes with the source."""
    spooled = tempfile.NamedTemporaryFile(prefix="veneer-stdin-", suffix=".jsonl")  # noqa: SIM115
    shutil.copyfileobj(sys.stdin.buffer, spooled)
    spooled.flush()

    # By way of the file itself, which is removed when nobody holds it any more.
    return Source(
        STDIN,
        "stdin",
        ("stdin",),
        lambda name: read_jsonl(Path(spooled.name), name),
        lambda: _hash(Path(spooled.name)),
    )


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None


def _first_word(name: str) -> str:
    return re.split(r"[-_.]", name.lower(), maxsplit=1)[0]
