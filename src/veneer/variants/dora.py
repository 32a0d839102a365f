"""DoRA: ``m / |W + s B A| * (W + s B A) x``, with the magnitude m of every output's weights trained apart.

The norms are taken as constants in the backward pass, as in section 4.3 of the paper, and found from thin products:
the updated weight is never built.

Liu et al., arXiv 2402.09353.

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from veneer.core.base import AbstractBase, InputBase, merge_dtype
from veneer.core.config import LoraConfig, PeftConfig
from veneer.core.errors import ConfigError
from veneer.core.init import AbstractInit, Start
from veneer.core.lora_variant import LoraVariant
from veneer.core.variant import ParameterSpec, factor_specs
from veneer.kernels.dora import row_norms, scale_rows

MAGNITUDE = "lora_magnitude_vector.weight"


@final
class Variant(LoraVariant):
    """A low-rank change of the direction of each row of W, and a magnitude for each."""

    options: ClassVar[Mapping[str, Any]] = {"use_dora": True}

    def parameters(self, base: AbstractBase, r: int, config: PeftConfig) -> dict[str, ParameterSpec]:
        assert isinstance(config, LoraConfig)
        if not base.one_matrix:
            raise ConfigError(
                f"use_dora=True has no meaning on {type(base.module).__name__}, whose {base.leaf} holds several "
                "matrices in one; leave use_dora at False or take it out of the targets."
            )
        specs = factor_specs(base, r, frozen_A=config.use_lorafa)
        # PEFT keeps the magnitude of a convolution as (1, O, 1, 1), next to a B of (O, R, 1, 1).
        out, more = base.shape()[0], len(base.factor_shapes(r)[1]) - 2
        shape = (1, out) + (1,) * more if more else (out,)
        specs[MAGNITUDE] = ParameterSpec(shape, file_key="lora_magnitude_vector")
        return specs

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
        moved = init.fill(Start(base, A, B, None, scaling, config, evidence))
        W_OI = base.weight() if moved is None else moved
        if init.subtracts:
            # As the system will take the starting factors off, to the bit, so that the magnitude is the norm.
            W_OI = W_OI.to(merge_dtype(W_OI, A)) - base.delta(A, B * scaling)
        p[MAGNITUDE].copy_(_norms(base, A, B, W_OI, scaling).view_as(p[MAGNITUDE]))
        return moved

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
        scale_O = _scale(base, p, base.weight(), scaling)
        bias_name = base.bias_name()
        bias_O = None if bias_name is None else getattr(base.module, bias_name)
        if y is None and not dropout:
            u = base.adapted(x, A, B, scaling, bias=None, dropout=0.0)
            return scale_rows(u, base.rows(u, scale_O), None if bias_O is None else base.rows(u, bias_O))
        # An id stands for a one-hot input, whose elements are tokens: it is dropped where its change comes out.
        ids = not x.is_floating_point()
        dropped = base.drop(x, dropout) if dropout and not ids else x
        own = base.frozen(dropped)
        if y is None:
            y = own if dropped is x else base.frozen(x)
        scale = base.rows(own, scale_O)
        if bias_O is not None:
            own = own - base.rows(own, bias_O)
        change = (scale - 1) * own + scale * base.low_rank(dropped, A, B, scaling, bias=None, dropout=0.0)
        if dropout and ids:
            kept = torch.rand(x.shape, device=x.device) >= dropout
            change = change * (kept / (1 - dropout)).unsqueeze(-1)
        return y + change.to(y.dtype)

    def update(self, base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, *, scaling: float) -> Tensor:
        scale_O1 = _scale(base, p, W_OI, scaling).unsqueeze(1)
        A, B = (p[name] for name in base.factor_names)
        return (scale_O1 - 1) * W_OI.to(scale_O1.dtype) + scale_O1 * (base.delta(A, B) * scaling)

    def merged_bias(
        self, base: AbstractBase, p: Mapping[str, Tensor], bias: Tensor | None, *, scaling: float
    ) -> Tensor | None:
        return bias


def _scale(base: AbstractBase, p: Mapping[str, Tensor], W_OI: Tensor, scaling: float) -> Tensor:
    """(O,) magnitude over norm in float32 or wider; zero for a row of zeros, which has no direction."""
    A, B = (p[name] for name in base.factor_names)
    norm_O = _norms(base, A, B, W_OI, scaling)
    m_O = p[MAGNITUDE].flatten()
    # In the precision of the magnitude, so that the two are equal at the start.
    rounded = norm_O.to(m_O.dtype).to(norm_O.dtype)
    has_direction = rounded > 0
    return torch.where(has_direction, m_O.to(norm_O.dtype) / torch.where(has_direction, rounded, 1), 0)


def _norms(base: AbstractBase, A: Tensor, B: Tensor, W_OI: Tensor, scaling: float) -> Tensor:
    """(O,) norms of the rows of ``W + s B A``."""
    A_RI, B_OR = A.flatten(1), B.flatten(1)
    if (B_OR.shape[0], A_RI.shape[1]) == W_OI.shape and A_RI.shape[0] == B_OR.shape[1]:
        return row_norms(W_OI, A_RI, B_OR, scaling)
    # The factors are laid out in blocks (a grouped convolution): then their product says what they mean.
    with torch.no_grad():
        delta = base.delta(A, B)
        return torch.linalg.vector_norm(W_OI.to(merge_dtype(W_OI, delta)) + delta * scaling, dim=1)
