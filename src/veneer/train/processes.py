"""The processes of a run: found as accelerate or torchrun started them, and never fewer than were asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from veneer.core.errors import ConfigError, UsageError
from veneer.train.config import RunConfig
from veneer.train.state import Saved
from veneer.train.strategy import chosen, enter, leave

if TYPE_CHECKING:
    from accelerate import Accelerator


def joined(config: RunConfig) -> Accelerator:
    """An accelerator for a run. accelerate keeps it for the whole process, which may do several runs.

    Raises:
        UsageError: the launcher started more processes than found each other: each would do the whole run alone; or
            it is configured for a strategy that is not offered, or not the run's.
        ConfigError: the run's strategy cannot train it.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    strategy = chosen(config)
    wanted = "bf16" if config.precision == "bf16" else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()
        leave()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not PartialState._shared_state and not torch.accelerator.is_available():
        # Without being told so, accelerate does not look for other processes where there is no GPU.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        PartialState(cpu=True)
    accelerator = Accelerator(mixed_precision=wanted)
    if accelerator.num_processes != started:
        raise UsageError(
            f"The launcher started {started} processes, but accelerate joined {accelerator.num_processes}; start the "
            "run with torchrun or accelerate launch, and without --cpu."
        )
    # An accelerator that is to measure which precision is faster is of no strategy yet.
    if config.precision != "auto":
        enter(accelerator, strategy, config)
    return accelerator


def examples_per_step(config: RunConfig, processes: int) -> int:
    """The examples of one optimiser step, over all processes."""
    return config.batch_size * config.accumulation * processes


def with_processes(config: RunConfig, saved: Saved, processes: int) -> tuple[RunConfig, list[str]]:
    """The config of a resumed run on another number of processes: its steps keep their examples.

    Raises:
        ConfigError: that is not possible.
    """
    before = saved.values["about"]["examples a step"]
    if examples_per_step(config, processes) == before:
        return config, []
    accumulation, rest = divmod(before, config.batch_size * processes)
    if rest or not accumulation:
        raise ConfigError(
            f"A step of this run has {before} examples, which {processes} processes cannot share in batches of "
            f"{config.batch_size}; resume it with another batch_size or number of processes."
        )
    note = f"On {processes} processes, {accumulation} batches of {config.batch_size} make a step of {before} examples."
    return config.model_copy(update={"accumulation": accumulation}), [note]
