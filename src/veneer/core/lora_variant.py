"""What the variants that ``LoraConfig`` selects have in common: their scaling, their start, and a bias beside B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from torch import Tensor

from veneer.core.base import AbstractBase
from veneer.core.config import LoraConfig, PeftConfig
from veneer.core.errors import ConfigError, MergeError
from veneer.core.init import AbstractInit, Start
from veneer.core.variant import AbstractVariant, ParameterSpec, low_rank_scaling

BIAS = "lora_B.bias"
"""The key of the bias beside B that ``lora_bias`` adds."""


class LoraVariant(AbstractVariant):
    """A variant that an option of ``LoraConfig`` selects, or none. Abstract."""

    config_class: ClassVar[type[PeftConfig]] = LoraConfig

    @final
    def shared(self, shapes: Sequence[tuple[int, int]], config: PeftConfig) -> dict[str, Tensor]:
        return {}

    @final
    def scaling(self, r: int, lora_alpha: float, config: PeftConfig) -> float:
        assert isinstance(config, LoraConfig)
        return low_rank_scaling(r, lora_alpha, config.use_rslora)

    @final
    def in_file(self, key: str, tensor: Tensor, path: str, config: PeftConfig) -> Tensor:
        return tensor


class FactorVariant(LoraVariant):
    """One of them that has two factors, and perhaps a bias beside B, and nothing else to start. Abstract."""

    @final
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


def bias_specs(base: AbstractBase, config: LoraConfig) -> dict[str, ParameterSpec]:
    """The bias beside B, where the config asks for one.

    Raises:
        ConfigError: the operation has no place for it.
    """
    if not config.lora_bias:
        return {}
    if not base.has_output_bias:
        raise ConfigError(
            f"lora_bias=True has no meaning on {type(base.module).__name__}, whose operation has no bias; leave "
            "lora_bias at False or take that module out of target_modules."
        )
    return {BIAS: ParameterSpec((base.shape()[0],))}


def bias_merged(base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, scaling: float) -> Tensor | None:
    """The module's bias with the one beside B in it.

    Raises:
        MergeError: the module has none.
    """
    if BIAS not in p:
        return bias
    if bias is None:
        raise MergeError(
            f"This adapter has lora_bias=True, but the {type(base.module).__name__} it adapts has no bias to merge it "
            "into, and a model saved with a new one would lose it on loading; use the adapter unmerged."
        )
    return (bias + p[BIAS] * scaling).to(bias.dtype)
