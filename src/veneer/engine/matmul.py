"""Which library multiplies float32 matrices on a CPU: told by multiplying, and taken back at the end.

torch gives float32 products to the BLAS it was built with. On a processor that this BLAS does not know well (MKL on AMD
with AVX-512) oneDNN, which torch has too, is twice as fast. torch hands them over when products are allowed to be less
exact; whether they are depends on the processor. With AVX-512 they are full float32, with AMX they are rounded to
bfloat16. So the results are measured beside the times, and what is less exact is never taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import nn

from veneer.core.errors import ConfigError

Library = Literal["torch", "onednn"]
Choice = Literal["auto", "torch", "onednn"]

WORTH = 1.3
"""How many times as fast oneDNN must be to be chosen: less would flip with what else the machine does."""

EXACT = 1e-5
"""The largest error of a product, relative to its largest entry, that is float32's; bfloat16's is 100 times that."""

NARROW = 256
"""Products of models narrower than this take no time that is worth a choice."""

_ROWS = 512
"""Tokens of a product that is timed."""

_ROUNDS = 20
"""The best of many short ones: whatever else the machine does slows most of a few."""


@final
@dataclass(frozen=True)
class Matmuls:
    """What was measured, in 10^9 operations a second; and the error of oneDNN's results."""

    torch: float
    onednn: float
    error: float

    @property
    def chosen(self) -> Library:
        """``onednn`` where it is exact, and ``WORTH`` times as fast."""
        return "onednn" if self.error <= EXACT and self.onednn >= WORTH * self.torch else "torch"

    def __str__(self) -> str:
        inexact = "" if self.error <= EXACT else f", which is not exact here (relative error {self.error:.0e})"
        return f"{self.chosen}: torch {self.torch:,.3g} GFLOP/s, onednn {self.onednn:,.3g}{inexact}"


def measure(width: int, *, run: Callable[[Library, int], tuple[float, float]] | None = None) -> Matmuls | None:
    """The speed of float32 products of a model's size by either library, in turn.

    >>> measure(576).chosen
    'onednn'

    Args:
        width: the model's hidden size.
        run: the seconds and the relative error of one product, from library and width; by default it is done.

    Returns:
        None where there is nothing to choose: a narrow model, no oneDNN, or a precision that the user has set.
    """
    if width < NARROW or not available():
        return None
    run = run or _product
    best: dict[Library, float] = {"torch": float("inf"), "onednn": float("inf")}
    error = 0.0
    for _ in range(_ROUNDS):
        for name in best:
            seconds, found = run(name, min(width, 1024))
            best[name] = min(best[name], seconds)
            error = max(error, found if name == "onednn" else 0.0)
    work = 2 * _ROWS * min(width, 1024) ** 2 / 1e9
    return Matmuls(work / best["torch"], work / best["onednn"], error)


def settled(choice: Choice, model: nn.Module) -> Library:
    """The library for a model that is loaded: what is asked for, or for ``auto`` what is measured to be faster.

    >>> with multiplying(settled("auto", model)):
    ...     model(**inputs)

    Raises:
        ConfigError: oneDNN is asked for where it is not exact.
    """
    if choice != "auto":
        check(choice)
        return choice
    multiplies = any(parameter.dtype == torch.float32 for parameter in model.parameters())
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    products = measure(width_of(getattr(model, "config", None)) or 0) if multiplies and on_cpu else None
    return "torch" if products is None else products.chosen


def width_of(config: Any) -> int | None:
    """The hidden size that a transformers config tells; None where it tells none."""
    if not hasattr(config, "get_text_config"):
        return None
    width = getattr(config.get_text_config(), "hidden_size", None)
    return None if width is None else int(width)


def available() -> bool:
    """Whether the products can go to oneDNN, and the user has not said how exact they are to be."""
    return torch.backends.mkldnn.is_available() and _precision() == "highest"


def _precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "that of one backend alone"


def check(library: Library) -> None:
    """Refuse oneDNN where its products are not float32's.

    Raises:
        ConfigError: it is not there, or not exact on this processor.
    """
    if library == "torch":
        return
    if not torch.backends.mkldnn.is_available():
        raise ConfigError("matmul=onednn is not possible: this torch was built without oneDNN; use matmul=torch.")
    if _precision() not in ("highest", "high", "medium"):
        raise ConfigError(
            "matmul=onednn is not possible: torch.backends was told how exact float32 products of one library are to "
            "be; use matmul=torch."
        )
    _, error = _product("onednn", NARROW)
    if error > EXACT:
        raise ConfigError(
            f"matmul=onednn is not exact on this processor (relative error {error:.0e}); use matmul=torch, or "
            "precision=bf16, which says that it rounds."
        )


@contextmanager
def multiplying(library: Library) -> Iterator[None]:
    """Let one library multiply float32 matrices within a with block, and set it back after it.

    >>> with multiplying("onednn"):
    ...     y = x @ w
    """
    if library == "torch":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product(library: Library, width: int) -> tuple[float, float]:
    """The seconds that a product takes, the first time and then, and its relative error."""
    drawn = torch.Generator().manual_seed(0)
    x, w = torch.randn(_ROWS, width, generator=drawn), torch.randn(width, width, generator=drawn)
    with multiplying(library):
        torch.mm(x, w)
        began = time.perf_counter()
        y = torch.mm(x, w)
        seconds = time.perf_counter() - began
    # A few rows tell how exact all are.
    true = x[:8].double() @ w.double()
    return max(seconds, 1e-9), float((y[:8] - true).abs().max() / true.abs().max())
