"""Files that are whole or not there: written beside, flushed to disk, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from veneer.core.errors import DiskError


def write_whole(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write a set of files into a folder so that each is complete, and none is replaced unless all are written.

    Args:
        folder: created when missing.
        writers: from file name to a function that writes that file at the path it is given.

    Raises:
        DiskError: a file could not be written (disk full, no permission). What stood there before still stands.
    """
    written: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            beside = folder / f".{name}.{os.getpid()}.tmp"
            written[beside] = folder / name
            beside.touch()
            mode = beside.stat().st_mode
            write(beside)
            # safetensors makes files that only their owner can read, whatever the umask says.
            beside.chmod(mode)
            _flush(beside)
        for final in written.values():
            if final.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{final.name} is a folder")
        for beside, final in written.items():
            os.replace(beside, final)
        _flush(folder)
    except OSError as error:
        raise DiskError(
            f"Could not write to {folder}: {error.strerror or error}. What was there before is unchanged."
        ) from error
    finally:
        for beside in written:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write one text file whole.

    Raises:
        DiskError: see ``write_whole``.
    """
    write_whole(path.parent, {path.name: lambda beside: beside.write_text(text, encoding="utf-8")})


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
