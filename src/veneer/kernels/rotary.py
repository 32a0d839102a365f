"""Rotary position embedding in two passes over the queries and keys; of them nothing is kept for backward.

Su et al., arXiv 2104.09864, in the layout of transformers: the second half of a head is turned against the first.
Shape legend: B rows, H heads, T tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2
        # The halves change places, and so do their sines.
        swapped = torch.cat((sin[..., half:], sin[..., :half]), dim=-1)
        return _turned(grad, cos, swapped, -1.0), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + turn(x) * sin``, where ``turn`` of the halves (a, b) is (-b, a).

    Args:
        x: (B, H, T, D) queries or keys.
        cos: of the angles, broadcasting to x; no gradient flows into them.
        sin: likewise.

    Returns:
        (B, H, T, D).
    """
    if not torch.is_grad_enabled() or not x.requires_grad:
        return _turned(x, cos, sin, 1.0)
    y: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out
