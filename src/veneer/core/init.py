"""How an adapter starts: what A and B hold before the first step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from veneer.core.base import AbstractBase


class AbstractInit(ABC):
    """Fills fresh, uninitialised factors. A file ``inits/<name>.py`` defines the final class ``Init``."""

    identity: ClassVar[bool]
    """Whether a model with a fresh adapter gives exactly the base model's outputs."""

    @abstractmethod
    def fill(self, base: AbstractBase, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        """Write the starting values into A, B and the LoRA bias, in place.

        Shapes are ``base.factor_shapes(r)``; ``bias`` is (O,) or None.
        """
