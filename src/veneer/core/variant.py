"""What the update is: the parameters it needs, its forward, and the weight it merges into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from veneer.core.base import AbstractBase
from veneer.core.config import PeftConfig


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor that a variant needs on one layer."""

    shape: tuple[int, ...]
    """Its shape, as stored."""
    trainable: bool = True
    """Whether it learns."""


class AbstractVariant(ABC):
    """Functions over the parameters of one adapter on one layer. A variant holds no state.

    A file ``variants/<name>.py`` defines the final class ``Variant``. Parameters are keyed by the name
    they have on disk: ``lora_A.weight`` lives in memory as ``lora_A[adapter].weight``, a name without
    a dot such as ``lora_embedding_A`` as ``lora_embedding_A[adapter]``.
    """

    config_class: ClassVar[type[PeftConfig]]
    """The config that selects this variant."""

    @abstractmethod
    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        """The tensors needed on ``base`` at rank ``r``.

        Raises:
            ConfigError: the variant or an option of it has no meaning on this base.
        """

    @abstractmethod
    def scaling(self, r: int, lora_alpha: float, config: PeftConfig) -> float:
        """The factor s in ``W x + s B A x``."""

    @abstractmethod
    def forward(
        self,
        base: AbstractBase,
        p: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor | None,
        *,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """The layer's output with this adapter added.

        ``y`` is the output so far, or None for the first active adapter: the variant then calls the base
        itself, so that it may fuse. ``dropout`` is 0 outside training.
        """

    @abstractmethod
    def merged(self, base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, *, scaling: float) -> Tensor:
        """The weight that gives the same outputs: a new tensor in W's dtype; ``W_OI`` is not written to."""

    @abstractmethod
    def merged_bias(
        self, base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, *, scaling: float
    ) -> Tensor | None:
        """The bias that gives the same outputs; ``bias`` itself when the variant does not touch it.

        Raises:
            MergeError: the variant has a bias to merge and the module has no place for it.
        """
