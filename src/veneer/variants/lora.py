"""LoRA: ``W x + s B A x`` with s = alpha / r, or alpha / sqrt(r) for rsLoRA.

Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from torch import Tensor

from veneer.core.base import AbstractBase, InputBase
from veneer.core.config import LoraConfig, PeftConfig
from veneer.core.errors import ConfigError, MergeError
from veneer.core.init import AbstractInit, Start
from veneer.core.variant import AbstractVariant, ParameterSpec, factor_specs, low_rank_forward, low_rank_scaling

BIAS = "lora_B.bias"


@final
class Variant(AbstractVariant):
    """The low-rank update itself."""

    config_class: ClassVar[type[PeftConfig]] = LoraConfig
    options: ClassVar[Mapping[str, Any]] = {}

    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        assert isinstance(config, LoraConfig)
        specs = factor_specs(base, r, frozen_A=config.use_lorafa)
        if config.lora_bias:
            if not base.has_output_bias:
                raise ConfigError(
                    f"lora_bias=True has no meaning on {type(base.module).__name__}, whose operation has no bias; "
                    "leave lora_bias at False or take that module out of target_modules."
                )
            specs[BIAS] = ParameterSpec((base.shape()[0],))
        return specs

    def shared(self, shapes: Sequence[tuple[int, int]], config: PeftConfig) -> dict[str, Tensor]:
        return {}

    def scaling(self, r: int, lora_alpha: float, config: PeftConfig) -> float:
        assert isinstance(config, LoraConfig)
        return low_rank_scaling(r, lora_alpha, config.use_rslora)

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
        A, B = (p[name] for name in base.factor_names)
        return init.fill(Start(base, A, B, p.get(BIAS), scaling, config, evidence))

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
        if BIAS not in p:
            return bias
        if bias is None:
            raise MergeError(
                f"This adapter has lora_bias=True, but the {type(base.module).__name__} it adapts has no bias to "
                "merge it into, and a model saved with a new one would lose it on loading; use the adapter unmerged."
            )
        return (bias + p[BIAS] * scaling).to(bias.dtype)

    def in_file(self, key: str, tensor: Tensor, path: str, config: PeftConfig) -> Tensor:
        return tensor
