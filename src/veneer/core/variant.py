"""What the update is: the parameters it needs, how they start, its forward, and the change of W it stands for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from veneer.core import registry
from veneer.core.base import AbstractBase, InputBase
from veneer.core.config import PeftConfig
from veneer.core.errors import ConfigError, listed
from veneer.core.init import AbstractInit


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor that a variant needs on one layer."""

    shape: tuple[int, ...]
    """Its shape, as stored."""
    trainable: bool = True
    """Whether it learns."""
    saved: bool = True
    """Whether it is in the adapter's file."""
    file_key: str | None = None
    """Its name in the file, where that is not its key: PEFT's files are older than some names in memory."""


class AbstractVariant(ABC):
    """Functions over the parameters of one adapter on one layer. A variant holds no state.

    A file ``variants/<name>.py`` defines the final class ``Variant``. Parameters are keyed by the name
    they have on disk: ``lora_A.weight`` lives in memory as ``lora_A[adapter].weight``, a name without
    a dot such as ``lora_embedding_A`` as ``lora_embedding_A[adapter]``. The rare one whose name on disk is
    another says so (``ParameterSpec.file_key``).

    Every variant is a change of the weight, ``W + update(W)``, computed from the frozen W: so the updates of
    several active adapters add up, in the forward pass and merged alike.
    """

    config_class: ClassVar[type[PeftConfig]]
    """The config that selects this variant."""
    options: ClassVar[Mapping[str, Any]]
    """Fields of the config that select it among the variants of that config, each with a value that is on."""

    @abstractmethod
    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        """The tensors needed on ``base`` at rank ``r``.

        Raises:
            ConfigError: the variant or an option of it has no meaning on this base.
        """

    @abstractmethod
    def shared(self, shapes: Sequence[tuple[int, int]], config: PeftConfig) -> dict[str, Tensor]:
        """Frozen tensors that all layers of one adapter share, keyed as on disk; none for most variants.

        Args:
            shapes: (O, I) of every adapted layer.
            config: the adapter's config.
        """

    @abstractmethod
    def scaling(self, r: int, lora_alpha: float, config: PeftConfig) -> float:
        """The factor s in ``W x + s B A x``."""

    @abstractmethod
    def start(
        self,
        base: AbstractBase,
        p: Mapping[str, Tensor],
        init: AbstractInit,
        *,
        scaling: float,
        config: PeftConfig,
        evidence: Mapping[str, Tensor] | None,
    ) -> Tensor | None:
        """Fill fresh tensors in place.

        Returns:
            The (O, I) weight that the adapter is to stand on instead of W, or None; see ``AbstractInit.fill``.
        """

    @abstractmethod
    def forward(
        self,
        base: InputBase,
        p: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor | None,
        *,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """The layer's output with this adapter added.

        ``y`` is the output so far, or None for the first active adapter: the variant then calls the base
        itself, so that it may fuse. ``dropout`` is 0 outside training. ``p`` holds the shared tensors too.
        """

    @abstractmethod
    def update(self, base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, *, scaling: float) -> Tensor:
        """The change of the frozen weight ``W_OI`` that gives the same outputs.

        Returns:
            A new (O, I) tensor in float32 or wider, differentiable in ``p``.

        Raises:
            MergeError: the change cannot be written as one matrix in the place of W.
        """

    @abstractmethod
    def merged_bias(
        self, base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, *, scaling: float
    ) -> Tensor | None:
        """The bias that gives the same outputs; ``bias`` itself when the variant does not touch it.

        Raises:
            MergeError: the variant has a bias to merge and the module has no place for it.
        """

    @abstractmethod
    def in_file(self, key: str, tensor: Tensor, path: str, config: PeftConfig) -> Tensor | None:
        """What of a tensor goes into the adapter's file: the tensor itself, for most variants.

        Args:
            key: the tensor's key.
            tensor: its value.
            path: the layer's path in the base model; empty for a shared tensor, which may stay out (None).
            config: the adapter's config as it is now.
        """


def factor_specs(base: AbstractBase, r: int, *, frozen_A: bool) -> dict[str, ParameterSpec]:
    """The two factors of a low-rank update on ``base``.

    Raises:
        ConfigError: ``frozen_A`` on a base whose A starts at zero, which would stay zero.
    """
    A, B = (
        ParameterSpec(shape, trainable=not frozen_A or number > 0) for number, shape in enumerate(base.factor_shapes(r))
    )
    if frozen_A and base.zero_factor == "A":
        raise ConfigError(
            f"use_lorafa=True has no meaning on {type(base.module).__name__}: the factor that it would freeze "
            "starts at zero there; take that module out of target_modules."
        )
    return dict(zip(base.factor_names, (A, B), strict=True))


def low_rank_scaling(r: int, lora_alpha: float, rank_stabilised: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
    return lora_alpha / math.sqrt(r) if rank_stabilised else lora_alpha / r


def low_rank_forward(
    base: InputBase,
    A: Tensor,
    B: Tensor,
    x: Tensor,
    y: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    bias: Tensor | None = None,
) -> Tensor:
    """``AbstractVariant.forward`` of an update that is ``scaling * (B A + bias)`` with these factors."""
    if y is None:
        return base.adapted(x, A, B, scaling, bias=bias, dropout=dropout)
    return y + base.low_rank(x, A, B, scaling, bias=bias, dropout=dropout).to(y.dtype)


def variant_of(config: PeftConfig) -> AbstractVariant:
    """The variant that a config selects: the one of its class with the most of its options on.

    Raises:
        ConfigError: the config asks for two variants at once.
    """
    found: list[AbstractVariant] = []
    for name in registry.names("variants"):
        variant: AbstractVariant = registry.load("variants", name).Variant()
        if variant.config_class is type(config) and all(getattr(config, option) for option in variant.options):
            found.append(variant)
    chosen = max(found, key=lambda variant: len(variant.options))
    others = {option for variant in found for option in variant.options} - set(chosen.options)
    if others:
        every = sorted({*chosen.options, *others})
        given = [name for name in every if getattr(config, name) != getattr(type(config), name)]
        raise ConfigError(f"{listed(given)} cannot be combined; choose one of them.")
    return chosen
