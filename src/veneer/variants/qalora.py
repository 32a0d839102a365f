"""QALoRA: A looks at the sums of groups of inputs, so that the update has one value for each group of a row of W.

The update is then constant over the groups that a quantised weight shares its scales and zero points in. PEFT computes
with the mean of each group, times the number of groups; so does this. Xu et al., arXiv 2309.14717.

Shape legend: I inputs, O outputs, R rank, G groups of S inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from torch import Tensor

from veneer.core.base import AbstractBase, InputBase
from veneer.core.config import LoraConfig, PeftConfig
from veneer.core.errors import ConfigError
from veneer.core.lora_variant import BIAS, FactorVariant, bias_merged, bias_specs
from veneer.core.variant import ParameterSpec, factor_specs, low_rank_forward

STARTS = ("kaiming", "gaussian", "random")
"""The starts that look at no weight: others would give A a column for each input."""


@final
class Variant(FactorVariant):
    """A low-rank update whose A is constant over groups of inputs."""

    options: ClassVar[Mapping[str, Any]] = {"use_qalora": True, "qalora_group_size": 2}

    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        assert isinstance(config, LoraConfig)
        name, size = type(base.module).__name__, config.qalora_group_size
        if not base.one_matrix or base.zero_factor == "A" or any(len(shape) > 2 for shape in base.factor_shapes(r)):
            raise ConfigError(
                f"use_qalora=True has no meaning on {name}, which is no linear layer whose inputs could be grouped; "
                "take that module out of the targets."
            )
        inputs = base.shape()[1]
        if inputs % size:
            raise ConfigError(
                f"qalora_group_size is {size}, but {name} has {inputs} inputs, which cannot be put into groups of "
                "that size; choose a divisor, or take that module out of the targets."
            )
        if config.init not in STARTS:
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} starts from single inputs, which use_qalora=True "
                'takes in groups; expected true, false or "gaussian".'
            )
        specs = factor_specs(base, r, frozen_A=config.use_lorafa)
        A = base.factor_names[0]
        specs[A] = ParameterSpec((specs[A].shape[0], inputs // size), trainable=specs[A].trainable)
        return specs | bias_specs(base, config)

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
        A, B = _factors(base, p)
        return low_rank_forward(base, A, B, x, y, scaling=scaling, dropout=dropout, bias=p.get(BIAS))

    def update(self, base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, *, scaling: float) -> Tensor:
        return base.delta(*_factors(base, p)) * scaling

    def merged_bias(
        self, base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, *, scaling: float
    ) -> Tensor | None:
        return bias_merged(base, p, bias, scaling)


def _factors(base: AbstractBase, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A with a column for each input, and B; the product with it is the groups' means times their number."""
    A_RG, B = (p[name] for name in base.factor_names)
    groups, inputs = A_RG.shape[1], base.shape()[1]
    size = inputs // groups
    return (A_RG * (groups / size)).repeat_interleave(size, dim=1), B
