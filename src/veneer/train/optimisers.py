"""AdamW and the learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    faster: Iterable[nn.Parameter] = (),
    ratio: float = 1.0,
) -> AdamW:
    """AdamW, fused where the device has it. Vectors (biases, norms) do not decay.

    Args:
        parameters: those that do not learn are left out.
        learning_rate: in step units.
        weight_decay: of matrices.
        faster: parameters among them that learn ``ratio`` times as fast (LoRA+).
        ratio: see ``faster``.
    """
    fast = {id(parameter) for parameter in faster}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    slow = [parameter for parameter in trained if id(parameter) not in fast]
    groups = [
        {"params": [p for p in slow if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in slow if p.ndim < 2], "weight_decay": 0.0},
        {
            "params": [p for p in trained if id(p) in fast],
            "weight_decay": weight_decay,
            "lr": learning_rate * ratio,
        },
    ]
    groups = [group for group in groups if group["params"]]
    try:
        return AdamW(groups, lr=learning_rate, fused=True)
    except RuntimeError:
        # Which devices have a fused step differs between torch releases; it says so itself.
        return AdamW(groups, lr=learning_rate)


def scheduled(optimiser: torch.optim.Optimizer, name: str, *, steps: int, warmup: float) -> LambdaLR:
    """A scheduler to be stepped once after each optimiser step.

    Args:
        optimiser: its learning rate is the highest reached.
        name: "cosine" and "linear" end at zero, "constant" stays.
        steps: the optimiser steps of the whole run.
        warmup: a share of the steps when below 1, else a number of steps.
    """
    return LambdaLR(optimiser, factor(name, steps=steps, warmup=warmup))


def factor(name: str, *, steps: int, warmup: float) -> Callable[[int], float]:
    """From steps taken to what the learning rate is multiplied with. The first step is never wasted on zero."""
    rising = min(steps, round(steps * warmup) if warmup < 1 else round(warmup))
    shape = _SHAPES[name]

    def at(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return shape((step - rising) / max(1, steps - rising))

    return at


_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""From the share of the steps after the warmup to the factor."""
