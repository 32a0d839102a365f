"""Rows encoded chunk by chunk, here or in processes of their own; the chunks are the same for any number of these."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from veneer.core.errors import VeneerError
from veneer.data.encoder import Encoder
from veneer.data.rows import BadRow, Row
from veneer.data.sources import Source
from veneer.data.store import Chunk, packed

CHUNK = 256
"""The most rows that are encoded at a time."""
CHARACTERS = 1_000_000
"""Characters after which a chunk ends earlier, so that long documents do not fill the memory."""

# As in torch's DataLoader: what is forked starts at once, and needs no guard in the program's main module.
START = "fork" if sys.platform == "linux" else "spawn"
"""How processes are started."""

_encoder: Encoder | None = None


def encoded(sources: Sequence[Source], encoder: Encoder, workers: int) -> Iterator[Chunk]:
    """What becomes of the rows of some sources, in their order.

    Args:
        sources: what to read, here.
        encoder: what makes sequences of a row.
        workers: processes that encode; 0 encodes here. Memory holds a few chunks for each.

    Raises:
        DataError, UsageError: a source that cannot be read, behind the rows before it.
        VeneerError: a process came to an end by itself.
    """
    if workers == 0:
        for rows in _chunks(sources):
            yield packed(map(encoder, rows))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(START), _start, (encoder, os.getpid()))
    try:
        with warnings.catch_warnings():
            # Python warns of forks beside threads; what is forked here, at the first task, does nothing but encode.
            warnings.simplefilter("ignore", DeprecationWarning)
            pool.submit(os.getpid)
        yield from _in_order(pool, _chunks(sources), 2 * workers)
    except BrokenProcessPool:
        raise VeneerError(
            "A process that encoded data came to an end by itself, mostly for want of memory; use fewer workers."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[list[Row | BadRow]], ahead: int) -> Iterator[Chunk]:
    waiting: deque[Future[Chunk]] = deque()
    try:
        for rows in chunks:
            waiting.append(pool.submit(_encode, rows))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
    except VeneerError:
        # What was read before the failure counts first, as it would here.
        yield from (future.result() for future in waiting)
        raise
    yield from (future.result() for future in waiting)


def _chunks(sources: Sequence[Source]) -> Iterator[list[Row | BadRow]]:
    rows: list[Row | BadRow] = []
    characters = 0
    try:
        for row in (row for source in sources for row in source.read()):
            rows.append(row)
            characters += _characters(row.values) if isinstance(row, Row) else 0
            if len(rows) == CHUNK or characters > CHARACTERS:
                yield rows
                rows, characters = [], 0
    except VeneerError:
        yield rows
        raise
    if rows:
        yield rows


def _characters(value: Any) -> int:
    """The characters of all texts in a row's values, and the bytes of its files."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


def _start(encoder: Encoder, parent: int) -> None:
    """Prepare a process for its work."""
    global _encoder
    _encoder = encoder
    # Ctrl-C reaches all processes; the one that started these ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process when the one that started it was killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode(rows: list[Row | BadRow]) -> Chunk:
    assert _encoder is not None
    return packed(map(_encoder, rows))
