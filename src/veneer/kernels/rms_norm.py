"""Root-mean-square norm with a frozen weight: of its input alone and one number a row is kept for backward.

Zhang and Sennrich, arXiv 1910.07467. Shape legend: N tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_D: Tensor, eps: float, offset: float) -> Tensor:
        y, r = _forward(x, w_D, eps, offset)
        ctx.save_for_backward(x, w_D, r)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_D, r = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        # dx = r (g w) - x r^3 mean(g w x)
        gw = grad.to(wide) * _factor(w_D.to(wide), ctx.offset)
        mean = (gw * x).mean(-1, keepdim=True)
        dx = gw.mul_(r).addcmul_(x, mean.mul_(r.pow(3)), value=-1)
        return dx.to(grad.dtype), None, None, None


def rms_norm(x: Tensor, w_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + w)``, computed in float32 or wider.

    Args:
        x: (..., D) input of any floating dtype; the output has it too.
        w_D: frozen weight.
        eps: added to the mean of the squares.
        offset: 1 for the families that store the weight as its distance from one (gemma). Those round once at the
            end, the others before they multiply with the weight; so does this.

    Returns:
        (..., D).
    """
    if not torch.is_grad_enabled() or not x.requires_grad:
        return _forward(x, w_D, eps, offset)[0]
    y: Tensor = _RMSNorm.apply(x, w_D, eps, offset)  # type: ignore[no-untyped-call]
    return y


def _forward(x: Tensor, w_D: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # A norm reads x once and writes next to nothing, where squares would be a tensor of their own.
    r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    if offset:
        return (wide * r).mul_(_factor(w_D.to(wide.dtype), offset)).to(x.dtype), r
    normed = (wide * r).to(x.dtype)
    return (normed.mul_(w_D) if w_D.dtype == x.dtype else normed * w_D), r


def _factor(w_D: Tensor, offset: float) -> Tensor:
    return w_D + offset if offset else w_D
