"""Data sets of the ``datasets`` library: a folder that ``save_to_disk`` wrote, and a name on the hub.

Their rows stay on disk, memory-mapped. Code that comes with a data set is never run: that library no longer can.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.core.errors import UsageError
from veneer.data.files import Read
from veneer.data.rows import Row

if TYPE_CHECKING:
    from datasets import Dataset

# A bare name may mean a folder that is misspelt, or one of the library's own readers, which read whatever lies around.
_HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?")
_BATCH = 1024
"""Rows that are turned into Python values at once."""


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder: of one data set, or of one with splits."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def saved_sets(folder: Path) -> dict[str, Dataset]:
    """The splits of a folder that ``save_to_disk`` wrote; one without splits has the name of the folder.

    Raises:
        UsageError: the library is missing, or cannot read it.
    """
    datasets = _library(f"Reading {str(folder)!r}")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UsageError(f"{str(folder)!r} is no whole folder of datasets' save_to_disk: {_reason(error)}.") from error
    return dict(found) if isinstance(found, datasets.DatasetDict) else {folder.name: found}


def may_be_on_hub(name: str) -> bool:
    """Whether a text has the form of a data set's name on the hub, with or without a ``:configuration``."""
    return _HUB_NAME.fullmatch(name) is not None


def hub_sets(name: str) -> dict[str, Dataset]:
    """The splits of a data set on the hub, or of its copy in the cache, by their names.

    Args:
        name: such as ``someone/dataset``, or ``someone/dataset:configuration`` where it has several.

    Raises:
        UsageError: the library is missing, the hub is switched off or out of reach and there is no copy, or there is
            no such data set; in one sentence without a final stop.
    """
    found = _HUB_NAME.fullmatch(name)
    assert found is not None
    datasets = _library("reading it from the hub")
    try:
        return dict(datasets.load_dataset(found["name"], found["config"]))
    except Exception as error:
        if datasets.config.HF_HUB_OFFLINE:
            raise UsageError("as a name on the hub it is not in the cache, and the hub is switched off") from error
        raise UsageError(f"the hub gave no data for it: {_reason(error)}") from error


def read_set(rows: Dataset, name: str) -> Read:
    """The rows of one data set, named by their number."""
    number = 0
    for batch in rows.with_format("arrow").iter(batch_size=_BATCH):
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{name}:{number}", values)


def digest(rows: Dataset) -> str:
    """A hash of the files that a data set's rows stand in."""
    found = hashlib.sha256(rows._fingerprint.encode())
    for file in rows.cache_files:
        with open(file["filename"], "rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()


def _library(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{what} needs datasets; install it with: pip install 'veneer[data]'") from None
    return datasets


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else f"{text[:197]}...").rstrip(".")
