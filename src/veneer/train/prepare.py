"""Everything before the first step: data read and encoded, the model loaded and adapted, the folder checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.adapters.budget import set_total_step
from veneer.adapters.model import PeftModel
from veneer.core.disk import is_unfinished
from veneer.core.errors import ConfigError, DataError, UsageError, listed, nearest
from veneer.core.records import PartRecord
from veneer.data.batching import Batching, padding
from veneer.data.encode import Encoded, EncodedSet
from veneer.data.rows import Row
from veneer.engine.accelerate import Acceleration, accelerate
from veneer.tasks import task as tasks
from veneer.tasks.limits import longest_input
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import AbstractTask, Piece
from veneer.train.config import RunConfig
from veneer.train.methods import Trained, prepared
from veneer.train.optimisers import check_installed, remarks
from veneer.train.samples import goals, prompts
from veneer.train.sets import Sets, asked_for, both_sets
from veneer.train.starts import gathering
from veneer.train.trackers import check_trackers

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PretrainedConfig, PreTrainedModel

MAX_TOKENS = {"cpu": 512, "other": 8192}
"""Tokens at once when a run does not say: a GPU is idle with few, and the caches of a CPU are small."""


@dataclass(frozen=True)
class Plan:
    """A run that is about to begin."""

    config: RunConfig
    task: AbstractTask
    tokenizer: Any
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
    asked: Sequence[Encoded] = ()
    """Held-out prompts that are answered at each measurement."""
    parts: tuple[PartRecord, ...] = ()
    """What the training data is made of."""

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
    tokenizer: Any,
    train_rows: Iterable[Mapping[str, Any]] | None,
    eval_rows: Iterable[Mapping[str, Any]] | None,
    processes: int,
    resume: bool = False,
    console: Console | None = None,
) -> Plan:
    """Check and load all that a run needs, the cheap things first. Nothing is written.

    Raises:
        UsageError, ConfigError, DataError: whatever is wrong, in one sentence.
    """
    from accelerate import PartialState

    task = tasks.get(config.task)
    if not resume:
        check_free(Path(config.output).expanduser())
    check_trackers(config)
    check_installed(config.optimizer)
    if config.model is None and (model is None or tokenizer is None):
        raise ConfigError("The run config has no model: expected a folder, or a name on the hub.")
    asked = asked_for(config, task, train_rows, eval_rows)
    model_config = task.config(str(config.model)) if model is None else getattr(model, "config", None)
    task = fitted(task, asked, config, model_config)
    tokenizer = tokenizer if tokenizer is not None else task.processor(str(config.model))
    tokenizer, said = task.prepare(asked, tokenizer)
    said += remarks(config.optimizer, PartialState().device.type)
    sets = both_sets(config, task, asked, tokenizer, model_config, console)
    samples = prompts(config, task, asked.measured(sets), tokenizer, longest_input(model_config))
    model = _loaded(config, task) if model is None else _given(config, task, model)
    gather = gathering(task, sets.train.examples, tokenizer, config.batch_size)
    trained = prepared(model, config, task.task_type, gather, task.program)
    packs = task.packs and config.packing != "off"
    library = "torch" if config.matmul == "auto" else config.matmul
    speed = accelerate(trained.model, kernels=config.kernels == "on", packing=packs, matmul=library)
    batching, decided = _batching(config, speed, sets, processes)
    steps = config.max_steps or max(1, round(batching.steps_per_pass * config.epochs))
    if isinstance(trained.model, PeftModel):
        set_total_step(trained.model.base_model, steps)
    return Plan(
        config=config,
        task=task,
        tokenizer=tokenizer,
        train_set=sets.train,
        held_out=sets.held_out,
        asked=samples,
        parts=sets.parts,
        trained=trained,
        notes=(*sets.notes, *said, *trained.notes, *decided, *speed.notes()),
        batching=batching,
        speed=speed,
        steps=steps,
    )


def fitted(task: AbstractTask, rows: Iterable[Row], config: RunConfig, model: PretrainedConfig | None) -> AbstractTask:
    """The task as the training rows and a run's options make it.

    Raises:
        ConfigError: an option that has no meaning for it, or a best metric that it does not have.
        DataError: rows from which it cannot be told.
    """
    options = TaskOptions(**{field.name: getattr(config, field.name) for field in fields(TaskOptions)})
    task = task.fitted(_good(rows, task) if config.on_bad_row == "skip" else rows, options, model)
    if config.batch_size < task.least:
        raise ConfigError(
            f"batch_size is {config.batch_size}; task {config.task} compares at least {task.least} examples."
        )
    metrics = goals(task, config.samples)
    if config.best_metric not in metrics:
        raise ConfigError(
            f"best_metric is {config.best_metric!r}; task {config.task} has {listed(metrics)}."
            f"{nearest(config.best_metric, metrics)}"
        )
    return task


def _good(rows: Iterable[Row], task: AbstractTask) -> Iterator[Row]:
    for row in rows:
        with contextlib.suppress(DataError):
            task.check(row)
            yield row


def _loaded(config: RunConfig, task: AbstractTask) -> PreTrainedModel:
    dtype = "bfloat16" if config.precision == "bf16" and config.method == "lora" else "float32"
    return task.model(str(config.model), dtype=dtype, quantize=config.quantize)


def _given(config: RunConfig, task: AbstractTask, model: PreTrainedModel) -> PreTrainedModel:
    if config.quantize is not None:
        raise ConfigError(
            f"quantize={config.quantize} has no effect on a model that is loaded already; load that one quantised, or "
            "name the model in the config."
        )
    wanted, has = task.model_options().get("num_labels"), getattr(getattr(model, "config", None), "num_labels", None)
    if wanted is not None and wanted != has:
        raise ConfigError(
            f"The model's head has {has} outputs, and the data has {wanted} labels; load it with as many."
        )
    return model


def _batching(config: RunConfig, speed: Acceleration, sets: Sets, processes: int) -> tuple[Batching, list[str]]:
    """How examples become steps, and what was decided about it."""
    from accelerate import PartialState

    lengths = sets.train.lengths
    padded = Batching(
        lengths, config.batch_size, config.accumulation, processes, seed=config.seed, mixture=sets.mixture
    )
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
    """Refuse a run folder that has something in it, other than what a run left that was killed as it began.

    Raises:
        UsageError: it is not empty, or not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"The output {str(folder)!r} is a file; expected a new or empty folder.")
    if folder.is_dir() and not all(map(is_unfinished, folder.iterdir())):
        raise UsageError(f"The output folder {str(folder)!r} exists and is not empty; name another, or remove it.")
