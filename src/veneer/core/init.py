"""How an adapter starts: what A and B hold before the first step, and which weight they stand on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from veneer.core.base import AbstractBase
from veneer.core.config import PeftConfig

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

    @abstractmethod
    def fill(self, start: Start) -> Tensor | None:
        """Write the starting values into A, B and the LoRA bias, in place.

        Returns:
            None, or the (O, I) weight that the adapter is to stand on instead of W.
        """
