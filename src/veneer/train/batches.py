"""The batches of a run, with the rows that each comes from, in groups of one optimiser step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch

from veneer.data.batching import Micro
from veneer.train.prepare import Plan


def batches_from(plan: Plan, start: int, *, process: int, device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of one optimiser step after another, pass after pass, without end.

    Args:
        plan: the run.
        start: the step to begin with, counted from 0: the same batches come as if all before had been taken.
        process: whose share of each step.
        device: where the tensors go.

    Yields:
        What the task collates, with ``origins``, the list of its rows, and ``counts``, false for one that a process
        only goes along with.
    """
    per_pass = plan.batching.steps_per_pass
    for number in count(start // per_pass):
        begun = start % per_pass if number == start // per_pass else 0
        for step in islice(plan.batching.steps(number), begun, None):
            yield [_batch(plan, micro, device) for micro in step[process]]


def largest(plan: Plan, *, process: int, device: torch.device) -> dict[str, Any]:
    """The micro-batch with the most tokens, padding included, of a process's share of the first pass."""
    lengths = plan.train_set.lengths

    def tokens(micro: Micro) -> int:
        each = [lengths[index] for index in micro.indices]
        return sum(each) if plan.batching.packed else len(each) * max(each)

    micros = (micro for step in plan.batching.steps(0) for micro in step[process])
    batch = _batch(plan, max(micros, key=tokens), device)
    return {key: value for key, value in batch.items() if key not in ("origins", "counts")}


def _batch(plan: Plan, micro: Micro, device: torch.device) -> dict[str, Any]:
    examples = [plan.train_set.examples[index] for index in micro.indices]
    batch = plan.task.collate(examples, plan.tokenizer, packed=plan.batching.packed)
    placed = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    return {**placed, "origins": [example.origin for example in examples], "counts": micro.counts}
