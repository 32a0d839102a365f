"""LoRA: ``W x + s B A x`` with s = alpha / r, or alpha / sqrt(r) for rsLoRA.

Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from torch import Tensor

from veneer.core.base import AbstractBase, InputBase
from veneer.core.config import LoraConfig, PeftConfig
from veneer.core.lora_variant import BIAS, FactorVariant, bias_merged, bias_specs
from veneer.core.variant import ParameterSpec, factor_specs, low_rank_forward


@final
class Variant(FactorVariant):
    """The low-rank update itself."""

    options: ClassVar[Mapping[str, Any]] = {}

    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        assert isinstance(config, LoraConfig)
        return factor_specs(base, r, frozen_A=config.use_lorafa) | bias_specs(base, config)

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
        A, B = (p[name] for name in base.factor_names)
        return low_rank_forward(base, A, B, x, y, scaling=scaling, dropout=dropout, bias=p.get(BIAS))

    def update(self, base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, *, scaling: float) -> Tensor:
        A, B = (p[name] for name in base.factor_names)
        return base.delta(A, B) * scaling

    def merged_bias(
        self, base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, *, scaling: float
    ) -> Tensor | None:
        return bias_merged(base, p, bias, scaling)
