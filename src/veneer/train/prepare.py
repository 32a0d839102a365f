"""Everything before the first step: data read and encoded, the model loaded and adapted, the folder checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.adapters.budget import set_total_step
from veneer.adapters.model import PeftModel
from veneer.core.errors import ConfigError, UsageError, listed, nearest
from veneer.core.records import PartRecord
from veneer.data.batching import Batching, padding
from veneer.data.encode import Encoded, EncodedSet
from veneer.engine.accelerate import Acceleration, accelerate
from veneer.tasks import task as tasks
from veneer.tasks.task import AbstractTask, Piece
from veneer.train.config import RunConfig
from veneer.train.methods import Trained, prepared
from veneer.train.optimisers import check_installed, remarks
from veneer.train.sets import Sets, asked_for, both_sets
from veneer.train.starts import gathering
from veneer.train.trackers import check_trackers

if TYPE_CHECKING:
    from rich.console import Console
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
    tokenizer: PreTrainedTokenizerBase | None,
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

    from veneer.tasks.loading import load_config, load_tokenizer

    task = tasks.get(config.task)
    if not resume:
        check_free(Path(config.output).expanduser())
    _check_metric(config, task)
    check_trackers(config)
    check_installed(config.optimizer)
    if config.model is None and (model is None or tokenizer is None):
        raise ConfigError("The run config has no model: expected a folder, or a name on the hub.")
    asked = asked_for(config, train_rows, eval_rows)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(str(config.model))
    tokenizer, said = task.prepare(asked, tokenizer)
    said += remarks(config.optimizer, PartialState().device.type)
    model_config = load_config(str(config.model)) if model is None else model.config
    sets = both_sets(config, task, asked, tokenizer, model_config, console)
    model = _loaded(config, task) if model is None else _given(config, model)
    gather = gathering(task, sets.train.examples, tokenizer, config.batch_size)
    trained = prepared(model, config, task.task_type, gather)
    packs = task.packs and config.packing != "off"
    speed = accelerate(trained.model, kernels=config.kernels == "on", packing=packs)
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
        parts=sets.parts,
        trained=trained,
        notes=(*sets.notes, *said, *trained.notes, *decided, *speed.notes()),
        batching=batching,
        speed=speed,
        steps=steps,
    )


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
    """Refuse a run folder that has something in it.

    Raises:
        UsageError: it is not empty, or not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"The output {str(folder)!r} is a file; expected a new or empty folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"The output folder {str(folder)!r} exists and is not empty; name another, or remove it.")
