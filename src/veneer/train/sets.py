"""The training set and the held-out set of a run: which rows, and what they are as tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.core.errors import ConfigError, DataError, UsageError, listed
from veneer.data.columns import parsed, renamed
from veneer.data.encode import EncodedSet
from veneer.data.formats import usable
from veneer.data.sources import (
    HELD_OUT_NAMES,
    STDIN,
    TEST_NAMES,
    TRAIN_NAMES,
    Row,
    Source,
    chosen,
    read_rows,
    rows_of,
    sources,
)
from veneer.tasks.task import AbstractTask
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def data_name(config: RunConfig) -> str:
    """What to call the training data in a sentence."""
    if config.data is None:
        return "given by the program"
    return listed(Path(name).name for name in given(config.data))


def given(names: str | list[str]) -> list[str]:
    """Names of data as a list."""
    return [names] if isinstance(names, str) else names


def both_rows(
    config: RunConfig, train_rows: Iterable[Mapping[str, Any]] | None, eval_rows: Iterable[Mapping[str, Any]] | None
) -> tuple[list[Row], list[Row], list[str]]:
    """Training rows, held-out rows, and what was decided about them."""
    bad: list[str] | None = [] if config.on_bad_row == "skip" else None
    rows, held_out_files, notes = _training(config, train_rows, bad, look=eval_rows is None)
    rows = checked(rows, config.columns, bad)
    if eval_rows is not None:
        held_out = checked(rows_of(eval_rows), config.columns, bad)
    elif config.eval_data is not None or held_out_files:
        found = _asked_for(config.eval_data) if config.eval_data else held_out_files
        held_out = checked(read_rows(found, bad=bad), config.columns, bad)
    else:
        rows, held_out = _split(rows, config.eval_fraction, config.seed)
        if not held_out:
            notes.append("Nothing is held out, so no best is kept, only the last.")
    if bad:
        notes.append(f"{len(bad):,} bad rows are left out: {' '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}")
    return rows, held_out, notes


def _training(
    config: RunConfig, train_rows: Iterable[Mapping[str, Any]] | None, bad: list[str] | None, *, look: bool
) -> tuple[list[Row], Sequence[Source], list[str]]:
    """Rows to train on, what is to be held out of the same folders, and what was decided about it."""
    if train_rows is not None:
        return rows_of(train_rows), (), []
    if config.data is None:
        raise ConfigError("The run config has no data: expected a .jsonl, .csv or .parquet file, or a folder of them.")
    _check_stdin(config)
    train: list[Source] = []
    held_out: list[Source] = []
    notes = []
    for name in given(config.data):
        files = sources(name)
        named = chosen(files, TRAIN_NAMES)
        kept = chosen(files, HELD_OUT_NAMES) if named and look and not config.eval_data else []
        if named and len(files) > len(named):
            others = [file.name for file in files if file not in named and file not in kept]
            notes.append(
                f"Of {name}, {listed(f.name for f in named)} is trained on, "
                f"{listed(f.name for f in kept) or 'nothing'} is held out, {listed(others) or 'nothing'} is left alone."
            )
        train += named or files
        held_out += kept
    return read_rows(train, bad=bad), held_out, notes


def _asked_for(names: str | list[str]) -> list[Source]:
    """The held-out data that is named; of a folder or data set that has its own, that alone."""
    each = map(sources, given(names))
    taken = [chosen(files, HELD_OUT_NAMES) or chosen(files, TEST_NAMES) or files for files in each]
    return [file for files in taken for file in files]


def _check_stdin(config: RunConfig) -> None:
    from accelerate import PartialState

    names = [*given(config.data or []), *given(config.eval_data or [])]
    if names.count(STDIN) > 1:
        raise ConfigError(f"data {STDIN} (stdin) is given twice, and can be read once; write it to a file.")
    if STDIN in names and PartialState().num_processes > 1:
        raise UsageError(
            f"data {STDIN} (stdin) reaches one process alone, and this run has several; write it to a file."
        )


def both_sets(
    config: RunConfig,
    task: AbstractTask,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    held_out_rows: Sequence[Row],
    limit: int | None,
) -> tuple[EncodedSet, EncodedSet | None, list[str]]:
    """Both sets as tokens, none longer than the model takes, and what that cut."""
    how = {
        "max_length": min(config.max_length, limit or config.max_length),
        "train_on": config.train_on,
        "truncate": config.truncate,
    }
    train_set = task.encode(rows, tokenizer, **how)
    held_out = _held_out(task, held_out_rows, tokenizer, how)
    if held_out is None and config.patience is not None:
        raise ConfigError("patience has no meaning when nothing is held out; give eval_data or eval_fraction.")
    if limit is None or limit >= config.max_length or not train_set.report.truncated:
        return train_set, held_out, []
    said = f"The model takes {limit} tokens at most, so examples are cut there, not at {config.max_length}."
    return train_set, held_out, [said]


def checked(rows: Sequence[Row], columns: str | None, bad: list[str] | None) -> list[Row]:
    """Rows under the names that are understood, without the bad ones when these are collected.

    Raises:
        DataError: a column that is named is not there, or no row is left.
    """
    found = list(rows) if columns is None else renamed(rows, parsed(columns))
    if bad is None:
        return found
    found = usable(found, bad)
    if not found:
        raise DataError(f"None of the {len(rows):,} rows can be used; the first: {bad[0]}")
    return found


def _split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a share of the rows, at least one, chosen by the seed; both parts stay in order."""
    if fraction == 0 or len(rows) < 2:
        return rows, []
    count = min(len(rows) - 1, max(1, round(len(rows) * fraction)))
    out = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [row for index, row in enumerate(rows) if index not in out]
    return kept, [row for index, row in enumerate(rows) if index in out]


def _held_out(
    task: AbstractTask, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, how: dict[str, Any]
) -> EncodedSet | None:
    if not rows:
        return None
    try:
        return task.encode(rows, tokenizer, **how)
    except DataError as error:
        raise DataError(f"In the held-out data: {error}") from None
