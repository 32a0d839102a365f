"""AdaLoRA: ``W x + s P L Q x`` with a diagonal L, whose entries are given to the layers that use them most.

Q is ``lora_A``, P is ``lora_B``, the diagonal of L is ``lora_E``. Which entries stay is decided while training, by
``veneer.adapters.budget``.

Zhang et al., arXiv 2303.10512.

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from veneer.core.adalora_config import AdaLoraConfig, E
from veneer.core.base import AbstractBase, InputBase
from veneer.core.config import PeftConfig
from veneer.core.errors import ConfigError
from veneer.core.init import AbstractInit
from veneer.core.variant import AbstractVariant, ParameterSpec, low_rank_forward

A, B = "lora_A", "lora_B"
_FACTORS = ("lora_A.weight", "lora_B.weight")


@final
class Variant(AbstractVariant):
    """A low-rank update in the form of a singular value decomposition."""

    config_class: ClassVar[type[PeftConfig]] = AdaLoraConfig
    options: ClassVar[Mapping[str, Any]] = {}

    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        if base.factor_names != _FACTORS or not base.one_matrix:
            raise ConfigError(
                f"AdaLoRA has no meaning on {type(base.module).__name__}: its parts are the singular vectors of one "
                "matrix that inputs are multiplied with; take that module out of target_modules."
            )
        out, inputs = base.shape()
        return {A: ParameterSpec((r, inputs)), B: ParameterSpec((out, r)), E: ParameterSpec((r, 1))}

    def shared(self, shapes: Sequence[tuple[int, int]], config: PeftConfig) -> dict[str, Tensor]:
        return {}

    def scaling(self, r: int, lora_alpha: float, config: PeftConfig) -> float:
        assert isinstance(config, AdaLoraConfig)
        # By the rank at the start, whatever is left of it; the small number is in PEFT's arithmetic too.
        return lora_alpha / (config.init_r + 1e-5)

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
        assert isinstance(config, AdaLoraConfig)
        deviation = 0.02 if config.init_lora_weights else 1.0
        nn.init.normal_(p[A], std=deviation)
        nn.init.normal_(p[B], std=deviation)
        if config.init_lora_weights:
            nn.init.zeros_(p[E])
        else:
            nn.init.normal_(p[E])
        return None

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
        factors = _factors(base, p)
        return low_rank_forward(base, *factors, x, y, scaling=scaling, dropout=dropout)

    def update(self, base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, *, scaling: float) -> Tensor:
        return base.delta(*_factors(base, p)) * scaling

    def merged_bias(
        self, base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, *, scaling: float
    ) -> Tensor | None:
        return bias

    def in_file(self, key: str, tensor: Tensor, path: str, config: PeftConfig) -> Tensor:
        assert isinstance(config, AdaLoraConfig)
        kept = (config.rank_pattern or {}).get(f"{path}.{E}")
        dim = 1 if key == B else 0
        if kept is None or tensor.shape[dim] == sum(kept):
            return tensor
        return tensor.index_select(dim, torch.tensor(kept, device=tensor.device).nonzero().flatten())


def _factors(base: AbstractBase, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """``L Q`` and P in the shapes of this base's factors."""
    A_shape, B_shape = base.factor_shapes(p[E].shape[0])
    return (p[A] * p[E]).view(A_shape), p[B].view(B_shape)
