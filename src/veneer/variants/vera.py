"""VeRA: ``W x + b * B (d * (A x))`` with one frozen random pair A, B for all layers, and two small vectors for each.

Kopiczko et al., arXiv 2310.11454.

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.base import AbstractBase, InputBase, merge_dtype
from veneer.core.config import PeftConfig
from veneer.core.errors import ConfigError
from veneer.core.init import AbstractInit
from veneer.core.variant import AbstractVariant, ParameterSpec
from veneer.core.vera_config import VeraConfig

A, B = "vera_A", "vera_B"
LAMBDA_B, LAMBDA_D = "vera_lambda_b", "vera_lambda_d"
_FACTORS = ("lora_A.weight", "lora_B.weight")


@final
class Variant(AbstractVariant):
    """Two trained vectors around a shared random pair, of which each layer uses as much as it is large."""

    config_class: ClassVar[type[PeftConfig]] = VeraConfig
    options: ClassVar[Mapping[str, Any]] = {}

    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        out, inputs = base.shape()
        if base.factor_names != _FACTORS or base.factor_shapes(r) != ((r, inputs), (out, r)):
            raise ConfigError(
                f"VeRA has no meaning on {type(base.module).__name__}, which is no linear layer: it cannot share a "
                "pair of matrices with others; take that module out of target_modules."
            )
        return {LAMBDA_B: ParameterSpec((out,)), LAMBDA_D: ParameterSpec((r,))}

    def shared(self, shapes: Sequence[tuple[int, int]], config: PeftConfig) -> dict[str, Tensor]:
        """The random pair, as large as the largest layer needs: A (R, I) and B (O, R), float32, on the CPU."""
        assert isinstance(config, VeraConfig)
        out, inputs = (max(shape[side] for shape in shapes) for side in (0, 1))
        generator = torch.Generator(device="cpu").manual_seed(config.projection_prng_key)
        return {A: _drawn((config.r, inputs), generator), B: _drawn((out, config.r), generator)}

    def scaling(self, r: int, lora_alpha: float, config: PeftConfig) -> float:
        return 1.0

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
        assert isinstance(config, VeraConfig)
        if config.init_weights:
            nn.init.zeros_(p[LAMBDA_B])
            nn.init.constant_(p[LAMBDA_D], config.d_initial)
        else:
            nn.init.ones_(p[LAMBDA_B])
            nn.init.normal_(p[LAMBDA_D])
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
        y = base.frozen(x) if y is None else y
        A_RI, B_OR = _pair(base, p)
        # The pair is frozen: as two products with vectors between them nothing is kept for its gradient.
        z = F.linear(base.drop(x, dropout), A_RI.to(x.dtype))
        z = F.linear(z * p[LAMBDA_D].to(z.dtype), B_OR.to(z.dtype))
        return y + (z * p[LAMBDA_B].to(z.dtype)).to(y.dtype)

    def update(self, base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, *, scaling: float) -> Tensor:
        A_RI, B_OR = _pair(base, p)
        wide = merge_dtype(p[LAMBDA_B], p[LAMBDA_D], A_RI)
        d_R1, b_O1 = p[LAMBDA_D].to(wide).unsqueeze(1), p[LAMBDA_B].to(wide).unsqueeze(1)
        return base.delta(d_R1 * A_RI, b_O1 * B_OR)

    def merged_bias(
        self, base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, *, scaling: float
    ) -> Tensor | None:
        return bias

    def in_file(self, key: str, tensor: Tensor, path: str, config: PeftConfig) -> Tensor | None:
        assert isinstance(config, VeraConfig)
        return tensor if path or config.save_projection else None


def _drawn(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform for a fan-in of the second dimension, with PEFT's gain."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _pair(base: AbstractBase, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The part of the shared pair that this layer uses, on its device."""
    out, inputs = base.shape()
    device = p[LAMBDA_D].device
    return p[A][:, :inputs].to(device), p[B][:out].to(device)
