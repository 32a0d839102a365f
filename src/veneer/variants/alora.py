"""Activated LoRA: ``W x + s B A x`` for the tokens from an invocation sequence on, ``W x`` for those before it.

What a model computes before the invocation is what the base computes, so its key-value cache can be shared by the base
and many such adapters. Greenewald et al., arXiv 2504.12397.

Shape legend: B sequences, T tokens, M tokens from the invocation on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from torch import Tensor

from veneer.core import registry
from veneer.core.base import AbstractBase, InputBase
from veneer.core.config import LoraConfig, PeftConfig
from veneer.core.errors import ConfigError, MergeError, UsageError
from veneer.core.init import AbstractInit
from veneer.core.lora_variant import BIAS, FactorVariant, bias_specs
from veneer.core.variant import ParameterSpec, factor_specs

MASK = "alora_mask"
"""The key of the (B, T) tokens that the call at hand changes; whoever calls the model fills it in."""


@final
class Variant(FactorVariant):
    """The low-rank update, on a part of the tokens."""

    options: ClassVar[Mapping[str, Any]] = {"alora_invocation_tokens": [1, 2]}

    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        assert isinstance(config, LoraConfig)
        if not isinstance(base, InputBase) or not base.linear_layer:
            raise ConfigError(
                f"alora_invocation_tokens has no meaning on {type(base.module).__name__}, which is no linear layer; "
                "take that module out of the targets."
            )
        init: AbstractInit = registry.load("inits", config.init).Init()
        if init.subtracts or init.moves:
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} lets the adapter stand on another weight than the "
                "base's, which alora_invocation_tokens keeps as it is before the invocation; choose another start."
            )
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
        if y is None:
            y = base.frozen(x)
        mask_BT = p.get(MASK)
        if mask_BT is None:
            raise UsageError(
                "An adapter with alora_invocation_tokens looks for them in input_ids, so the whole model has to be "
                "called with them, not a module inside it."
            )
        if x.shape[:-1] != mask_BT.shape:
            raise UsageError(
                f"An adapter with alora_invocation_tokens is on a module whose input has shape {tuple(x.shape)}, while "
                f"input_ids has {tuple(mask_BT.shape)}; leave out modules that do not see every token."
            )
        A, B = (p[name] for name in base.factor_names)
        z_MO = base.low_rank(x[mask_BT], A, B, scaling, bias=p.get(BIAS), dropout=dropout)
        return y.index_put((mask_BT,), y[mask_BT] + z_MO.to(y.dtype))

    def update(self, base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, *, scaling: float) -> Tensor:
        raise MergeError(_NO_MERGE)

    def merged_bias(
        self, base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, *, scaling: float
    ) -> Tensor | None:
        raise MergeError(_NO_MERGE)


_NO_MERGE = (
    "An adapter with alora_invocation_tokens changes only a part of the tokens, which no merged weight does; use it "
    "unmerged."
)
