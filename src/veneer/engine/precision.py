"""Which arithmetic is the faster one on a device: told by multiplying matrices, not by the device's name.

Half precision is several times as fast as float32 on one machine and hundreds of times slower on the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

WORTH = 1.5
"""How many times as fast bf16 must be to be chosen: less would flip with what else the machine does."""

BUDGET = 0.1
"""Seconds of multiplying, for each arithmetic; a size that would take longer is not begun."""


@final
@dataclass(frozen=True)
class Speeds:
    """What was measured."""

    size: int
    """Rows and columns of the matrices, the largest that both arithmetics had the time for."""
    gflops: Mapping[str, float]
    """Of each arithmetic, in 10^9 operations a second."""

    @property
    def chosen(self) -> str:
        """``bf16`` where it is ``WORTH`` times as fast as ``fp32``."""
        return "bf16" if self.gflops["bf16"] >= WORTH * self.gflops["fp32"] else "fp32"

    def __str__(self) -> str:
        told = ", ".join(f"{name} {speed:,.3g} GFLOP/s" for name, speed in self.gflops.items())
        return f"{self.chosen}, by matmuls of {self.size} x {self.size}: {told}"


def measure(width: int, device: torch.device, *, seconds: Callable[[str, int], float] | None = None) -> Speeds:
    """The speed of matrix products up to the size of a model's.

    >>> measure(576, torch.device("cpu")).chosen
    'fp32'

    Args:
        width: the model's hidden size.
        device: where it will run.
        seconds: how long one product takes, from arithmetic and size; by default it is timed.
    """
    timed = seconds or (lambda name, size: _seconds(_DTYPES[name], size, device))
    sizes = [size for size in (64, 128, 256, 512, 1024, 2048) if size <= max(width, 64)]
    found: dict[str, dict[int, float]] = {name: {} for name in _DTYPES}
    for name, speeds in found.items():
        left = BUDGET
        for size in sizes:
            took = timed(name, size)
            speeds[size] = 2 * size**3 / took / 1e9
            left -= _REPEATS * took
            # Twice the size is eight times the work.
            if left < _REPEATS * 8 * took:
                break
    common = max(set.intersection(*(set(speeds) for speeds in found.values())))
    return Speeds(common, {name: speeds[common] for name, speeds in found.items()})


_REPEATS = 4


def _seconds(dtype: torch.dtype, size: int, device: torch.device) -> float:
    """The shortest of a few products; the first, which also sets things up, does not count."""
    one, other = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for attempt in range(_REPEATS):
        began = time.perf_counter()
        torch.mm(one, other)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - began)
    return max(best, 1e-9)
