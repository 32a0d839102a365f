"""Encoded data, kept between runs under a hash of all that it depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from veneer.core.disk import write_folder
from veneer.core.errors import DataError, listed
from veneer.data.encoder import Encoder
from veneer.data.sources import Source, no_rows
from veneer.data.store import FORMAT, Chunk, Store, write_store
from veneer.data.workers import encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIBRARIES = ("transformers", "tokenizers", "jinja2")
"""Whose versions may change what a row becomes."""


@final
@dataclass(frozen=True)
class Prepared:
    """Data that is encoded."""

    store: Store
    kept: Path | None
    """The folder in the cache; None where nothing is kept."""
    reused: bool
    """Whether it was there already."""
    note: str | None = None
    """Why it could not be kept, in a sentence."""


def prepared(
    sources: Sequence[Source],
    encoder: Encoder,
    how: Mapping[str, Any],
    *,
    cache: Path | None,
    workers: int = 0,
    skip: bool = False,
    on_rows: Callable[[int], object] = lambda count: None,
) -> Prepared:
    """The rows of some sources as sequences, from the cache or encoded now.

    A folder of the cache is whole or not there. Of several processes that need the same, one encodes and the others
    wait for it.

    Args:
        sources: what to read.
        encoder: what makes sequences of a row.
        how: all that ``encoder`` was made with but the tokenizer, as JSON values.
        cache: the folder to keep encoded data in; None keeps nothing.
        workers: see ``encoded``.
        skip: leave bad rows out, instead of failing at the first.
        on_rows: told how many rows are done, now and then.

    Raises:
        DataError: a bad row without ``skip``, no row at all, or none that can be used.
        UsageError: a source that cannot be read.
        DiskError: the disk is full.
    """
    digests = [] if cache is None else _digests(sources)
    key = _key(digests, encoder, how) if digests else None
    chunks = _whole(encoded(sources, encoder, workers), skip, on_rows)
    chunks = _unchanged(chunks, sources, digests) if digests else chunks
    found = Prepared(_temporary(chunks), None, False) if cache is None or key is None else _kept(cache, key, chunks)
    store = found.store
    if not len(store.rows) and not store.bad:
        raise DataError(no_rows(sources))
    if store.bad and not skip:
        raise DataError(store.reasons[0])
    if not len(store.rows):
        raise DataError(f"None of the {store.bad:,} rows can be used; the first: {store.reasons[0]}")
    return found


def _whole(chunks: Iterator[Chunk], skip: bool, on_rows: Callable[[int], object]) -> Iterator[Chunk]:
    count = 0
    for chunk in chunks:
        if chunk.bad and not skip:
            raise DataError(chunk.bad[0])
        yield chunk
        count += len(chunk.columns["rows"]) + len(chunk.bad)
        on_rows(count)


def _unchanged(chunks: Iterator[Chunk], sources: Sequence[Source], digests: list[tuple[str, str]]) -> Iterator[Chunk]:
    """The same, as long as the sources are at the end what they were: else they would be kept under a wrong hash."""
    yield from chunks
    if _digests(sources) != digests:
        raise DataError(f"{listed(s.place for s in sources)} was changed while it was being read; start again.")


def _temporary(chunks: Iterator[Chunk]) -> Store:
    folder = Path(tempfile.mkdtemp(prefix="veneer-data-"))
    try:
        write_store(folder, chunks)
        return Store(folder, temporary=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _kept(cache: Path, key: str, chunks: Iterator[Chunk]) -> Prepared:
    from filelock import FileLock

    folder = cache / key
    with contextlib.suppress(DataError):
        return Prepared(Store(folder), folder, True)
    lock = FileLock(cache / f".{key}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        reason = error.strerror or str(error)
        note = f"The encoded data is not kept, because {str(cache)!r} is not writable: {reason}."
        return Prepared(_temporary(chunks), None, False, note)
    try:
        # Another process may have been faster.
        with contextlib.suppress(DataError):
            return Prepared(Store(folder), folder, True)
        for left in cache.glob(f".{key}.*.tmp"):
            # Of a process that was killed: who holds the lock is alone.
            shutil.rmtree(left, ignore_errors=True)
        write_folder(folder, lambda place: write_store(place, chunks), replace=True)
        return Prepared(Store(folder), folder, False)
    finally:
        lock.release()


def _digests(sources: Sequence[Source]) -> list[tuple[str, str]]:
    """The name and the hash of each source; nothing when one of them cannot be found again."""
    found = [(source.name, source.digest()) for source in sources]
    whole = [(name, digest) for name, digest in found if digest is not None]
    return whole if len(whole) == len(found) else []


def _key(digests: list[tuple[str, str]], encoder: Encoder, how: Mapping[str, Any]) -> str:
    """A hash of the content of the sources and of all that makes sequences of it."""
    parts = {
        "format": FORMAT,
        "sources": digests,
        "how": dict(how),
        "columns": dict(encoder.columns),
        "vocabulary": encoder.vocabulary,
        "tokenizer": _digest_of(encoder.tokenizer),
        "code": _code(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that a tokenizer saves: vocabulary, merges, special tokens, chat template."""
    with tempfile.TemporaryDirectory(prefix="veneer-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return _files(Path(folder))


def _code() -> str:
    """A hash of the code that makes sequences of rows, which says more than a version."""
    return _files(Path(__file__).parent, "*.py") + _files(Path(sys.modules["veneer"].__path__[0]) / "tasks", "*.py")


def _files(folder: Path, pattern: str = "**/*") -> str:
    found = hashlib.sha256()
    for path in sorted(path for path in folder.glob(pattern) if path.is_file()):
        found.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()
