"""Dropout that keeps where the random numbers began instead of what came of them.

PyTorch's own keeps a mask of the input's size, and a product of what was dropped keeps that too. A generator is
deterministic: from its state before the draw the same mask comes again in the backward pass. On a CPU the mask is
bit for bit that of ``torch.nn.functional.dropout`` from the same seed.

Shape legend: N tokens, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def state_of(device: torch.device) -> Tensor:
    """The state of the generator that the next ``mask`` on a device draws from; some bytes to some kilobytes."""
    return _generator(device).get_state()


def repeatable(x: Tensor) -> bool:
    """Whether a mask for x can be drawn again later: not while a compiler or a CUDA graph records the call."""
    if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def mask(
    shape: Sequence[int], p: float, *, dtype: torch.dtype, device: torch.device, state: Tensor | None = None
) -> Tensor:
    """Zeros with probability p, else ones, in a new contiguous tensor.

    >>> began = state_of(x.device)
    >>> first = mask(x.shape, 0.1, dtype=x.dtype, device=x.device)
    >>> again = mask(x.shape, 0.1, dtype=x.dtype, device=x.device, state=began)  # the same, and nothing global moved

    Args:
        shape: of the mask.
        p: the share that is zero.
        dtype: a floating-point one.
        device: where to make it.
        state: draw from there; without it from the device's global generator, which moves on.
    """
    drawn = torch.empty(tuple(shape), dtype=dtype, device=device)
    if state is None:
        return drawn.bernoulli_(1 - p)
    generator = torch.Generator(device)
    generator.set_state(state)
    return drawn.bernoulli_(1 - p, generator=generator)


def weight(p: float) -> float:
    """What kept elements are multiplied with, so that the expected value stays: 1 / (1 - p), or 0 if none is kept."""
    return 1 / (1 - p) if p < 1 else 0.0


def drop(x: Tensor, p: float) -> Tensor:
    """``torch.nn.functional.dropout(x, p)``, which keeps nothing of the size of x for its own backward.

    Args:
        x: any shape.
        p: the share to drop; 0 gives x itself.
    """
    if not p:
        return x
    if not torch.is_grad_enabled() or not repeatable(x):
        return F.dropout(x, p)
    dropped: Tensor = _Drop.apply(x, p)  # type: ignore[no-untyped-call]
    return dropped


def dropped_linear(x: Tensor, A_RI: Tensor, p: float) -> Tensor:
    """``linear(dropout(x, p), A)`` for an (..., I) input; x is kept for backward, and neither mask nor product.

    Args:
        x: (..., I); its dtype, or autocast's, is that of the product.
        A_RI: follows it in dtype.
        p: the share to drop.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    A_RI = A_RI.to(dtype)
    if not p or not torch.is_grad_enabled() or not repeatable(x):
        return F.linear(F.dropout(x, p) if p else x, A_RI)
    y: Tensor = _DroppedLinear.apply(x.to(dtype), A_RI, p)  # type: ignore[no-untyped-call]
    return y


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.state, ctx.p = state_of(x.device), p
        return mask(x.shape, p, dtype=x.dtype, device=x.device).mul_(weight(p)).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = mask(grad.shape, ctx.p, dtype=grad.dtype, device=grad.device, state=ctx.state)
        return kept.mul_(weight(ctx.p)).mul_(grad), None


class _DroppedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A_RI: Tensor, p: float) -> Tensor:
        ctx.state, ctx.p, ctx.shape = state_of(x.device), p, x.shape
        dropped = mask(x.shape, p, dtype=x.dtype, device=x.device).mul_(x)
        keep_x, keep_A, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if keep_A else None, A_RI if keep_x else None)
        return F.linear(dropped, A_RI).mul_(weight(p))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A_RI = ctx.saved_tensors
        need_x, need_A, _ = ctx.needs_input_grad
        kept = mask(ctx.shape, ctx.p, dtype=grad.dtype, device=grad.device, state=ctx.state)
        g_NR = grad.reshape(-1, grad.shape[-1]) * weight(ctx.p)
        d_x = d_A = None
        if need_x:
            d_x = (g_NR @ A_RI).view(ctx.shape).mul_(kept)
        if need_A:
            d_A = g_NR.t() @ kept.mul_(x).reshape(-1, ctx.shape[-1])
        return d_x, d_A, None


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
