"""Everything before the first step: data read and encoded, the model loaded and adapted, the folder checked."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.adapters.budget import set_total_step
from veneer.adapters.model import PeftModel
from veneer.core.errors import ConfigError, DataError, UsageError, listed, nearest
from veneer.data.batching import Batching, padding
from veneer.data.columns import parsed, renamed
from veneer.data.encode import Encoded, EncodedSet
from veneer.data.formats import usable
from veneer.data.sources import HELD_OUT_NAMES, TRAIN_NAMES, Row, chosen, data_files, read_rows, rows_of
from veneer.engine.accelerate import Acceleration, accelerate
from veneer.tasks import task as tasks
from veneer.tasks.task import AbstractTask, Piece, longest_input
from veneer.train.config import RunConfig
from veneer.train.methods import Trained, prepared
from veneer.train.optimisers import check_installed, remarks
from veneer.train.starts import gathering
from veneer.train.trackers import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = {"cpu": 1024, "other": 8192}
"""Tokens at once when a run does not say: a GPU is idle with few, and the caches of a CPU are small."""


@dataclass(frozen=True)
class Plan:
    """A run that is about to begin."""

    config: RunConfig
    task: AbstractTask
    tokenizer: PreTrainedTokenizerBase
    train_set: EncodedSet
    held_out: EncodedSet | None
    trained: Trained
    notes: tuple[str, ...]
    """Everything that was decided or left out on the way, in sentences."""
    batching: Batching
    """Which examples each step takes."""
    speed: Acceleration
    """What was done to the model to train it faster; to be undone after the run."""
    steps: int
    """Optimiser steps of the whole run."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the training data."""
        return self.batching.steps_per_pass

    @property
    def shown(self) -> Encoded:
        """The example to look at before training."""
        return self.train_set.examples[0]

    def preview(self) -> list[Piece]:
        """The text of that example in stretches that are trained or not."""
        return self.task.preview(self.shown, self.tokenizer)


def prepare(
    config: RunConfig,
    *,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    train_rows: Iterable[Mapping[str, Any]] | None,
    eval_rows: Iterable[Mapping[str, Any]] | None,
    processes: int,
    resume: bool = False,
) -> Plan:
    """Check and load all that a run needs, the cheap things first. Nothing is written.

    Raises:
        UsageError, ConfigError, DataError: whatever is wrong, in one sentence.
    """
    from accelerate import PartialState

    from veneer.tasks.loading import load_config, load_tokenizer

    task = tasks.get(config.task)
    if not resume:
        check_free(Path(config.output).expanduser())
    _check_metric(config, task)
    check_trackers(config)
    check_installed(config.optimizer)
    if config.model is None and (model is None or tokenizer is None):
        raise ConfigError("The run config has no model: expected a folder, or a name on the hub.")
    rows, held_out_rows, notes = _rows(config, train_rows, eval_rows)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(str(config.model))
    tokenizer, said = task.prepare(rows, tokenizer)
    said += remarks(config.optimizer, PartialState().device.type)
    limit = longest_input(load_config(str(config.model)) if model is None else model.config)
    train_set, held_out, cut = _sets(config, task, tokenizer, rows, held_out_rows, limit)
    model = _loaded(config, task) if model is None else _given(config, model)
    gather = gathering(task, train_set.examples, tokenizer, config.batch_size)
    trained = prepared(model, config, task.task_type, gather)
    packs = task.packs and config.packing != "off"
    speed = accelerate(trained.model, kernels=config.kernels == "on", packing=packs)
    batching, decided = _batching(config, speed, train_set.lengths, processes)
    steps = config.max_steps or max(1, round(batching.steps_per_pass * config.epochs))
    if isinstance(trained.model, PeftModel):
        set_total_step(trained.model.base_model, steps)
    return Plan(
        config=config,
        task=task,
        tokenizer=tokenizer,
        train_set=train_set,
        held_out=held_out,
        trained=trained,
        notes=(*notes, *said, *cut, *trained.notes, *decided, *speed.notes()),
        batching=batching,
        speed=speed,
        steps=steps,
    )


def _sets(
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


def _check_metric(config: RunConfig, task: AbstractTask) -> None:
    if config.best_metric not in task.goals:
        raise ConfigError(
            f"best_metric is {config.best_metric!r}; task {config.task} has {listed(task.goals)}."
            f"{nearest(config.best_metric, task.goals)}"
        )


def _loaded(config: RunConfig, task: AbstractTask) -> PreTrainedModel:
    from veneer.tasks.loading import load_model

    dtype = "bfloat16" if config.precision == "bf16" and config.method == "lora" else "float32"
    return load_model(str(config.model), auto_class=task.auto_class, dtype=dtype, quantize=config.quantize)


def _given(config: RunConfig, model: PreTrainedModel) -> PreTrainedModel:
    if config.quantize is not None:
        raise ConfigError(
            f"quantize={config.quantize} has no effect on a model that is loaded already; load that one quantised, or "
            "name the model in the config."
        )
    return model


def _batching(
    config: RunConfig, speed: Acceleration, lengths: Sequence[int], processes: int
) -> tuple[Batching, list[str]]:
    """How examples become steps, and what was decided about it."""
    from accelerate import PartialState

    common = {"lengths": lengths, "batch_size": config.batch_size, "accumulation": config.accumulation}
    padded = Batching(**common, processes=processes, seed=config.seed)  # type: ignore[arg-type]
    if speed.packing is None:
        if config.packing == "on":
            raise ConfigError(f"packing=on is not possible: examples of task {config.task} cannot lie end to end.")
        return padded, []
    if config.packing == "on":
        speed.packing.check()
    if speed.packing.reason is not None:
        return padded, [f"Batches are padded, because {speed.packing.reason}."]
    most = config.max_tokens or MAX_TOKENS.get(PartialState().device.type, MAX_TOKENS["other"])
    saved = padding(lengths, config.batch_size)
    note = f"Examples are packed, at most {most:,} tokens at once; padded batches would be {saved:.0%} padding."
    return replace(padded, packed=True, max_tokens=most), [note]


def check_free(folder: Path) -> None:
    """Refuse a run folder that has something in it.

    Raises:
        UsageError: it is not empty, or not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"The output {str(folder)!r} is a file; expected a new or empty folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"The output folder {str(folder)!r} exists and is not empty; name another, or remove it.")


def _rows(
    config: RunConfig, train_rows: Iterable[Mapping[str, Any]] | None, eval_rows: Iterable[Mapping[str, Any]] | None
) -> tuple[list[Row], list[Row], list[str]]:
    """Training rows, held-out rows, and what was decided about them."""
    bad: list[str] | None = [] if config.on_bad_row == "skip" else None
    rows, held_out_files, notes = _training(config, train_rows, bad, look=eval_rows is None)
    rows = checked(rows, config.columns, bad)
    if eval_rows is not None:
        held_out = checked(rows_of(eval_rows), config.columns, bad)
    elif config.eval_data is not None or held_out_files:
        held_out = checked(read_rows(config.eval_data or held_out_files, bad=bad), config.columns, bad)
    else:
        rows, held_out = _split(rows, config.eval_fraction, config.seed)
        if not held_out:
            notes.append("Nothing is held out, so no best is kept, only the last.")
    if bad:
        notes.append(f"{len(bad):,} bad rows are left out: {' '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}")
    return rows, held_out, notes


def _training(
    config: RunConfig, train_rows: Iterable[Mapping[str, Any]] | None, bad: list[str] | None, *, look: bool
) -> tuple[list[Row], Sequence[Path], list[str]]:
    """Rows to train on, the files of a folder that are to be held out, and what was decided about it."""
    if train_rows is not None:
        return rows_of(train_rows), (), []
    if config.data is None:
        raise ConfigError("The run config has no data: expected a .jsonl, .csv or .parquet file, or a folder of them.")
    files = data_files(config.data)
    named = chosen(files, TRAIN_NAMES)
    held_out = chosen(files, HELD_OUT_NAMES) if named and look and not config.eval_data else []
    notes = []
    if named and len(files) > len(named):
        others = [file.name for file in files if file not in named and file not in held_out]
        notes.append(
            f"Of {config.data}, {listed(f.name for f in named)} is trained on, "
            f"{listed(f.name for f in held_out) or 'nothing'} is held out, "
            f"{listed(others) or 'nothing'} is left alone."
        )
    return read_rows(named or files, bad=bad), held_out, notes


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
