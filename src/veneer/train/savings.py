"""What a run does so that its activations fit: layers that are computed twice, as many as needed, and offloading."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from veneer.engine import checkpointing, room
from veneer.engine.offload import offloaded
from veneer.train.batches import largest
from veneer.train.log import ProgressBar, RunLog
from veneer.train.prepare import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

_SHARE = 0.9
"""Of the memory that is free, what checkpoint=auto plans with when it is given no limit."""

_STATES = 3
"""Tensors of the size of what is trained: its gradient, and two moments."""


@contextlib.contextmanager
def saving(plan: Plan, model: nn.Module, accelerator: Accelerator, log: RunLog, bar: ProgressBar) -> Iterator[None]:
    """Whatever a run's config saves, for the length of the run; the model is afterwards as it was.

    Args:
        plan: the run.
        model: the model as it is trained.
        accelerator: what the run is on.
        log: gets what checkpoint=auto measured and chose.
        bar: shows it.
    """
    config, bare = plan.config, accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    count: int | None = 0
    if config.checkpoint == "auto":
        count = _chosen(plan, model, accelerator, log, bar)
    elif config.checkpoint != "off":
        count = layers_of(config.checkpoint)
    if count != 0:
        checkpointing.checkpoint_layers(bare, count)
    try:
        with offloaded(bare) if config.offload_activations else contextlib.nullcontext():
            yield
    finally:
        if count != 0:
            checkpointing.checkpoint_layers(bare, 0)


def size(text: str) -> int:
    """The bytes of a size such as ``4GB`` (10^9 each) or ``512 MiB`` (2^20 each)."""
    found = re.fullmatch(r"([\d.]+) ?([KMGT])(i?)B", text)
    assert found is not None
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (1 + "KMGT".index(prefix)))


def layers_of(checkpoint: str) -> int | None:
    """The number of layers that a config names; None where it names none."""
    return int(checkpoint) if checkpoint.isdigit() else None


def _chosen(plan: Plan, model: nn.Module, accelerator: Accelerator, log: RunLog, bar: ProgressBar) -> int:
    """The fewest layers with which every process stays within its limit.

    Two passes over the largest batch: one tells what each layer keeps, and one with all layers checkpointed what is
    alive at the same time even so.
    """
    from accelerate.utils import gather_object

    device, limit = accelerator.device, plan.config.memory_limit
    held = room.held(device)
    learning = [p for p in model.parameters() if p.requires_grad]
    taken = held + _STATES * sum(p.nbytes for p in learning)
    most = size(limit) if limit is not None else held + int(_SHARE * (room.free(device) or 0))
    batch = largest(plan, process=accelerator.process_index, device=device)
    model.train()
    kept = checkpointing.measure(model, lambda: plan.task.loss(model, batch))
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    checkpointing.checkpoint_layers(bare, None)
    try:
        with room.highest(device) as top, torch.random.fork_rng():
            plan.task.loss(model, batch).total.backward()  # type: ignore[no-untyped-call]
    finally:
        checkpointing.checkpoint_layers(bare, 0)
        model.zero_grad()
    # What comes and goes while it computes, above all the logits, is in no list of what is kept.
    passing = top[0] - held - sum(p.nbytes for p in learning) - kept.peak(len(kept.layers))
    kept = dataclasses.replace(kept, rest=kept.rest + max(0, passing))
    count = max(gather_object([kept.needed(most - taken)]))
    text = told(kept, count, taken=taken, limit=most)
    if accelerator.is_main_process:
        log.write("checkpoint", layers=count, of=len(kept.layers), needed=taken + kept.peak(count), message=text)
    bar.note(text)
    return count


def told(kept: checkpointing.Kept, count: int, *, taken: int, limit: int) -> str:
    """What was measured and chosen, in sentences; sizes in bytes."""
    layers = len(kept.layers)
    text = (
        f"checkpoint=auto: the largest batch takes {_gb(kept.peak(0))} with no layer checkpointed and "
        f"{_gb(kept.peak(layers))} with all {layers}, beside {_gb(taken)} for everything else; "
        f"to stay within {_gb(limit)}, {count} of {layers} are checkpointed."
    )
    if taken + kept.peak(count) > limit:
        text += f" Even so it takes {_gb(taken + kept.peak(count))}: make batch_size, max_tokens or max_length smaller."
    return text


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
