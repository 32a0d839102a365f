"""Folders of images or sounds: the folder that a file lies in is its label, as in ``train/cat/1.png``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from veneer.data.files import Read
from veneer.data.rows import Row

ENDINGS = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3"), "audio"),
}
"""From the ending of a file to the column that it stands in."""


def kind(path: Path) -> str | None:
    """The column for a file; None where it is neither an image nor a sound, or hidden."""
    return None if path.name.startswith(".") else ENDINGS.get(path.suffix.lower())


def splits(folder: Path, is_split: Callable[[str], bool], is_train: Callable[[str], bool]) -> list[Path]:
    """The folders to read apart: one for each split where there are any, else the folder itself; none without files.

    Args:
        folder: to look in.
        is_split: whether a folder's name says what it is for, as train and test do.
        is_train: whether it says that it is to be trained on.
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = [path.name for path in inside]
    if any(map(is_train, names)) or (names and all(map(is_split, names))):
        return [path for path in inside if _has_files(path)]
    return [folder] if _has_files(folder) else []


def read_folder(folder: Path, name: str) -> Read:
    """A row for each file, in the order of their paths: ``image`` or ``audio``, and ``label`` where it has one."""
    for path in _files(folder):
        inside = path.relative_to(folder)
        label = {"label": inside.parts[-2]} if len(inside.parts) > 1 else {}
        yield Row(f"{name}/{inside.as_posix()}", {str(kind(path)): str(inside), **label}, folder)


def read_single(path: Path, name: str) -> Read:
    """The row of a single file, without a label."""
    yield Row(name, {str(kind(path)): path.name}, path.parent)


def _has_files(folder: Path) -> bool:
    return any(kind(Path(name)) for _, _, names in os.walk(folder) for name in names)


def _files(folder: Path) -> list[Path]:
    return sorted(Path(place, name) for place, _, names in os.walk(folder) for name in names if kind(Path(name)))
