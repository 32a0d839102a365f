"""How an adapter starts: what A and B hold before the first step, and which weight they stand on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.core.base import AbstractBase, merge_dtype
from veneer.core.config import PeftConfig, TunerConfig
from veneer.core.errors import ConfigError

Identity = Literal["exact", "rounded", "none"]


@dataclass(frozen=True)
class Start:
    """What a start works on: fresh, uninitialised factors of one layer."""

    base: AbstractBase
    A: Tensor
    """As stored, see ``base.factor_shapes``."""
    B: Tensor
    """As stored."""
    bias: Tensor | None
    """(O,) bias of B, or None."""
    scaling: float
    """The factor of the update."""
    config: PeftConfig
    """The adapter's config."""
    evidence: Mapping[str, Tensor] | None
    """What was gathered about this layer on data, for a start that needs it."""


class AbstractInit(ABC):
    """Fills fresh factors. A file ``inits/<name>.py`` defines the final class ``Init``."""

    identity: ClassVar[Identity]
    """Whether a model with a fresh adapter gives the base model's outputs: bit for bit, but for rounding, or not."""
    random: ClassVar[bool]
    """Whether it draws from torch's generator."""
    subtracts: ClassVar[bool]
    """Whether the adapter then stands on ``W - scaling * B A`` of the factors it starts with, instead of on W."""
    moves: ClassVar[bool]
    """Whether ``fill`` returns a weight to stand on."""
    evidence: ClassVar[str | None]
    """The statistic of real data that it needs, gathered before the start, or None."""
    frozen: ClassVar[Literal["A", "B"] | None] = None
    """The factor that stays as it starts, or None when both learn."""
    repeatable: ClassVar[bool] = True
    """Whether W alone gives the same start again, in PEFT too, so that a file without it can be completed."""

    @abstractmethod
    def fill(self, start: Start) -> Tensor | None:
        """Write the starting values into A, B and the LoRA bias, in place.

        Returns:
            None, or the (O, I) weight that the adapter is to stand on instead of W.

        Raises:
            ConfigError: the start has no meaning on this layer, or evidence is missing. Nothing outside the given
                tensors was changed.
        """


def weight_of(start: Start, *, ranks: int = 1) -> tuple[Tensor, int]:
    """W as an (O, I) matrix in float32 or wider to be decomposed, and the rank of the factors.

    Args:
        start: the layer.
        ranks: how many times its rank the start takes from a matrix of this shape.

    Raises:
        ConfigError: the factors of this layer are not one pair of matrices, or W has fewer components than that.
    """
    base, r = start.base, start.A.shape[0]
    O, I = base.shape()  # noqa: E741 - the letters of the shape legend in base.py
    kind = type(base.module).__name__
    if not base.one_matrix or start.A.numel() != r * I or start.B.numel() != O * r or start.B.shape[:2] != (O, r):
        raise ConfigError(
            f"{_name(start)} has no meaning on this {kind}, whose factors are not one pair of matrices; use "
            "init_lora_weights=true, or take that module out of target_modules."
        )
    if ranks * r > min(O, I):
        raise ConfigError(
            f"{_name(start)} with rank {r} needs {ranks * r} components of the weight, but this {kind} is {O} x {I}; "
            f"give it a rank of at most {min(O, I) // ranks} in rank_pattern, or leave it out."
        )
    W = base.weight().detach()
    return W.to(merge_dtype(W)), r


def write(start: Start, A_RI: Tensor, B_OR: Tensor) -> None:
    """Put two matrices into the factors, in the shapes and dtype that these are stored in, and zero into the bias."""
    start.A.copy_(A_RI.reshape(start.A.shape))
    start.B.copy_(B_OR.reshape(start.B.shape))
    if start.bias is not None:
        nn.init.zeros_(start.bias)


def gathered(start: Start, *names: str, by: str) -> tuple[Tensor, ...]:
    """The evidence about this layer.

    Args:
        start: the layer.
        names: the statistics wanted.
        by: the call that gathers them, for the message.

    Raises:
        ConfigError: there is none, or what there is holds values that are not finite.
    """
    found = start.evidence or {}
    if any(name not in found for name in names):
        raise ConfigError(
            f"{_name(start)} starts from data, and none was gathered about this {type(start.base.module).__name__}; "
            f"call {by} first, with the same config."
        )
    if not all(bool(torch.isfinite(found[name]).all()) for name in names):
        raise ConfigError(f"What was gathered for {_name(start)} is not finite; check the data and the model's dtype.")
    return tuple(found[name] for name in names)


def _name(start: Start) -> str:
    assert isinstance(start.config, TunerConfig)
    return f"init_lora_weights={getattr(start.config, 'init_lora_weights', start.config.init)!r}"
