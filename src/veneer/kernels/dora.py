"""What DoRA needs beside a LoRA linear: the norms of the updated rows without the updated weight, and rows scaled.

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.base import merge_dtype
from veneer.kernels import reference

# Below this a scaled output may lose the number that it was scaled from, so that one is kept as well.
_NARROW = 1e-30


@torch.no_grad()
def row_norms(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """The Euclidean norms of the rows of ``W + scaling * B A``, which is never built.

    ``|w + u|^2 = |w|^2 + 2 w.u + |u|^2`` needs thin products only. Where an update all but cancels its row, the
    square is clamped at zero.

    Args:
        W_OI: the frozen weight, in any layout.
        A_RI: first factor.
        B_OR: second factor.
        scaling: the factor of the update.

    Returns:
        (O,) in float32 or wider, without a graph: DoRA takes the norms as constants (arXiv 2402.09353, section 4.3).
    """
    wide = merge_dtype(W_OI, A_RI, B_OR)
    # Under autocast these products would be rounded to half precision.
    with torch.autocast(W_OI.device.type, enabled=False):
        W, A, B = W_OI.to(wide), A_RI.to(wide), B_OR.to(wide)
        WA_RO = A @ W.t()
        AA_RR = A @ A.t()
        square_O = torch.linalg.vector_norm(W, dim=1).square()
        cross_O = (WA_RO.t() * B).sum(1)
        own_O = ((B @ AA_RR) * B).sum(1)
        total_O: Tensor = square_O + (2 * scaling) * cross_O + scaling**2 * own_O
        return total_O.clamp_min(0).sqrt()


class _ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and torch.finfo(u.dtype).tiny < _NARROW:
            # In place: nobody else holds u. The output tells what u was, as long as no scale is exactly zero.
            scale = torch.where(scale == 0, torch.finfo(u.dtype).tiny / torch.finfo(u.dtype).eps, scale)
            y = u.detach().mul_(scale)
            ctx.save_for_backward(y, scale)
            return y
        ctx.save_for_backward(u, scale, *(() if bias is None else (bias,)))
        return reference.scale_rows(u, scale, bias).to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, scale, *bias = ctx.saved_tensors
        need_u, need_scale, need_bias = ctx.needs_input_grad
        d_u = d_scale = d_bias = buffer = total = None
        if need_bias or (need_scale and bias):
            # A bias shows in u too: what is left of it here is what the scale takes away.
            total = _summed(grad, scale)
            d_bias = (1 - scale) * total
        if need_scale:
            buffer = grad * kept
            d_scale = _summed(buffer, scale)
            if bias:
                d_scale = d_scale - bias[0] * total
            elif torch.finfo(kept.dtype).tiny < _NARROW:
                d_scale = d_scale / scale
        if need_u:
            d_u = grad * scale.to(grad.dtype) if buffer is None else torch.mul(grad, scale.to(grad.dtype), out=buffer)
        return d_u, d_scale, d_bias if need_bias else None


def _summed(terms: Tensor, like: Tensor) -> Tensor:
    """The sum to the shape of a tensor, in its dtype: half precision is not added up in half precision."""
    extra = terms.ndim - like.ndim
    dims = [*range(extra), *(extra + d for d in range(like.ndim) if like.shape[d] == 1 and terms.shape[extra + d] != 1)]
    summed = terms.sum(dims, dtype=like.dtype) if dims else terms.to(like.dtype)
    return summed.reshape(like.shape)


def scale_rows(u: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``scale * (u - bias) + bias``: the outputs of a layer whose rows are scaled and whose bias is not.

    Args:
        u: a layer's fresh output, bias included. It is written over, so the caller must have the only hold of it.
        scale: one number an output, shaped so that it broadcasts against ``u``; float32 or wider.
        bias: the layer's bias, shaped as ``scale``, or None.

    Returns:
        The scaled output in the dtype of ``u``. A scale of one leaves ``u`` bit for bit.
    """
    if bias is not None:
        bias = bias.to(scale.dtype)
    if torch.compiler.is_compiling():
        # A compiler fuses these itself, and cannot follow the write in place.
        return reference.scale_rows(u, scale, bias).to(u.dtype)
    y: Tensor = _ScaleRows.apply(u, scale, bias)  # type: ignore[no-untyped-call]
    return y
