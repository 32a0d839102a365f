"""The optimisers by name, and the learning rate over time."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from veneer.core.errors import UsageError
from veneer.train.config import OptimiserName


def optimiser(
    name: OptimiserName,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    rates: Sequence[tuple[Iterable[nn.Parameter], float]] = (),
    device: str = "cpu",
) -> Optimizer:
    """An optimiser over what learns of the parameters. Vectors (biases, norms) do not decay.

    >>> optimiser("adamw_8bit", model.parameters(), learning_rate=2e-4, weight_decay=0.0)

    Args:
        name: which. Of bitsandbytes', tensors below 4096 elements keep a state of 32 bits.
        parameters: those that do not learn are left out.
        learning_rate: in step units.
        weight_decay: of matrices.
        rates: parameters among them with a learning rate of their own (the B of LoRA+, a new head).
        device: the type of device that will run the steps.

    Raises:
        UsageError: it needs bitsandbytes, which is not installed.
    """
    own = {id(parameter): rate for parameters, rate in rates for parameter in parameters}
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in trained if own.get(id(p), learning_rate) == rate and (p.ndim >= 2) == decays],
            "weight_decay": weight_decay if decays else 0.0,
            "lr": rate,
        }
        for rate in dict.fromkeys((learning_rate, *(rate for _, rate in rates)))
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    return _made(name, groups, learning_rate, paged=name.startswith("paged_") and device != "cpu")


def remarks(name: OptimiserName, device: str) -> tuple[str, ...]:
    """What is to be said of an optimiser on a device type, in sentences."""
    if name.startswith("paged_") and device == "cpu":
        return (f"optimizer={name} pages nothing on a CPU; it is {name.removeprefix('paged_')} here.",)
    return ()


def check_installed(name: OptimiserName) -> None:
    """Raise UsageError when an optimiser needs a package that is not there."""
    if "bit" in name and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"optimizer={name} needs bitsandbytes, which is not installed: pip install 'veneer[quant]'.")


def _made(name: str, groups: list[dict[str, Any]], rate: float, *, paged: bool) -> Optimizer:
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        # Its own rates would leave a factor that starts at zero where it is.
        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    if name != "adamw":
        return _of_bitsandbytes(name, groups, rate, paged=paged)
    try:
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    except RuntimeError:
        # Which devices have a fused step differs between torch releases; it says so itself.
        return torch.optim.AdamW(groups, lr=rate)


def _of_bitsandbytes(name: str, groups: list[dict[str, Any]], rate: float, *, paged: bool) -> Optimizer:
    check_installed(name)  # type: ignore[arg-type]
    # It says on import which optional speed-ups it misses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import optim

    classes: dict[str, Any] = {
        "adamw_8bit": optim.AdamW8bit,
        "adamw_32bit": optim.AdamW32bit,
        "lion_8bit": optim.Lion8bit,
    }
    made: Optimizer = classes[name.removeprefix("paged_")](groups, lr=rate, is_paged=paged)
    return made


def scheduled(optimiser: Optimizer, name: str, *, steps: int, warmup: float) -> LambdaLR:
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
