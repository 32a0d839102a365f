"""Files that are whole or not there: written beside, flushed to disk, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from veneer.core.errors import DiskError

Result = TypeVar("Result")


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


def is_unfinished(path: Path) -> bool:
    """Whether a path is what a process left that was killed while it wrote, by its name."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def write_folder(folder: Path, write: Callable[[Path], Result], *, replace: bool = False) -> Result:
    """Write a whole folder: a folder of that name is complete, or is what it was before.

    Args:
        folder: parents are made when missing.
        write: fills a new, empty folder at the path that it is given; what it returns is returned. When it fails,
            nothing is left.
        replace: let it take the place of a folder that is there.

    Raises:
        DiskError: a file could not be written, or the folder is there and ``replace`` is not given.
    """
    beside = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    aside = folder.parent / f".{folder.name}.{os.getpid()}.old"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        result = write(beside)
        for path in beside.rglob("*"):
            _flush(path)
        _flush(beside)
        if folder.exists() and not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if folder.exists():
            folder.rename(aside)
        beside.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        # What wrote a single file has wrapped the reason already, with the name of a folder that is gone by now.
        reason = error.__cause__ if isinstance(error, DiskError) and isinstance(error.__cause__, OSError) else error
        raise DiskError(f"Could not write {str(folder)!r}: {reason.strerror or reason}; nothing was left.") from error
    finally:
        if aside.exists() and not folder.exists():
            aside.rename(folder)
        for left in (beside, aside):
            shutil.rmtree(left, ignore_errors=True)
    return result


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
