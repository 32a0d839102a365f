"""A linear layer with a low-rank update, forward and backward written out.

Autograd's own graph of ``W x + s B(A x)`` keeps several intermediate results and adds two full-size
outputs. Here the update is added into W's fresh output in place, and only the input and ``x A^T`` are kept for
backward; what dropout took from it is drawn again. W is frozen, so nothing is kept for its gradient.

Shape legend: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import dropout as dropout_
from veneer.kernels import reference


def add_update(y_NO: Tensor, in_A: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Add ``scaling * B A x`` into ``y_NO`` in place; returns ``A x^T`` as (R, N)."""
    # With the thin factor on the left, a product of it is two to three times as fast on a CPU.
    xA_RN = A_RI @ in_A.reshape(-1, in_A.shape[-1]).t()
    y_NO.addmm_(xA_RN.t(), B_OR.t(), alpha=scaling)
    return xA_RN


def dropped_input(ctx: Any, x: Tensor, p: float) -> Tensor:
    """What A sees: x itself, or x with a share p at zero, not scaled up; ``ctx`` remembers how to draw it again."""
    ctx.p, ctx.shape = p, x.shape
    ctx.state = dropout_.state_of(x.device) if p else None
    return dropout_.mask(x.shape, p, dtype=x.dtype, device=x.device).mul_(x) if p else x


def input_gradients(
    ctx: Any, x: Tensor | None, A_RI: Tensor, gB_RN: Tensor, d_x: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of A, from that of ``A drop(x)``.

    Args:
        ctx: what ``dropped_input`` left there.
        x: the input, (..., I); None when A does not learn.
        A_RI: first factor.
        gB_RN: the gradient of ``A drop(x)``.
        d_x: (N, I) the gradient of x through W, written over; None when x does not learn.
    """
    kept_NI = d_A = None
    if ctx.p:
        kept = dropout_.mask(ctx.shape, ctx.p, dtype=gB_RN.dtype, device=gB_RN.device, state=ctx.state)
        kept_NI = kept.view(-1, A_RI.shape[1])
    if d_x is not None:
        if kept_NI is None:
            d_x.addmm_(gB_RN.t(), A_RI)
        else:
            d_x.addcmul_(gB_RN.t() @ A_RI, kept_NI)
        d_x = d_x.view(ctx.shape)
    if x is not None:
        x_NI = x.reshape(-1, x.shape[-1])
        d_A = gB_RN @ (x_NI if kept_NI is None else kept_NI.mul_(x_NI))
    return d_x, d_A


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_OI: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        scaling: float,
        p: float,
    ) -> Tensor:
        ctx.scaling = scaling * dropout_.weight(p)
        y_NO = F.linear(x.reshape(-1, x.shape[-1]), W_OI, bias_O)
        xA_RN = add_update(y_NO, dropped_input(ctx, x, p), A_RI, B_OR, ctx.scaling)
        # The input is kept for A's gradient alone, and what comes out of A for B's.
        keep_in, keep_out = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(x if keep_in else None, xA_RN if keep_out else None, W_OI, A_RI, B_OR)
        return y_NO.view(*x.shape[:-1], W_OI.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xA_RN, W_OI, A_RI, B_OR = ctx.saved_tensors
        need_x, _, need_bias, _, need_B = ctx.needs_input_grad[:5]
        g_NO = grad.reshape(-1, grad.shape[-1])
        gB_RN = (B_OR.t() @ g_NO.t()).mul_(ctx.scaling)
        d_B = (xA_RN @ g_NO).t().mul(ctx.scaling).contiguous() if need_B else None
        d_x, d_A = input_gradients(ctx, x, A_RI, gB_RN, g_NO @ W_OI if need_x else None)
        return d_x, None, g_NO.sum(0) if need_bias else None, d_A, d_B, None, None


def lora_linear(
    x: Tensor,
    W_OI: Tensor,
    bias_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """``W x + bias + scaling * B A drop(x)`` for inputs of any leading shape.

    Args:
        x: (..., I) input; its dtype, or autocast's, is the dtype of the computation and the result.
        W_OI: frozen weight. One that requires a gradient is computed by the reference instead.
        bias_O: the layer's bias, trainable or not.
        A_RI: first factor, in any floating dtype: it is the thin one, so it follows x and not x it.
        B_OR: second factor, likewise.
        scaling: the factor of the update.
        dropout: the share of x that A does not see; drawn anew at every call.

    Returns:
        (..., O) output.

    Raises:
        RuntimeError: x and W differ in dtype outside autocast, as ``torch.nn.functional.linear`` does.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    A, B = A_RI.to(dtype), B_OR.to(dtype)
    if not torch.is_grad_enabled():
        # Without a graph there is nothing to save.
        y_NO = F.linear(x.reshape(-1, x.shape[-1]), W_OI, bias_O)
        add_update(y_NO, F.dropout(x, dropout).to(dtype) if dropout else x.to(dtype), A, B, scaling)
        return y_NO.view(*x.shape[:-1], W_OI.shape[0])
    if W_OI.requires_grad or (dropout and not dropout_.repeatable(x)):
        return reference.lora_linear(x, W_OI, bias_O, A, B, scaling, F.dropout(x, dropout) if dropout else None)
    if autocast:
        x, W_OI = x.to(dtype), W_OI.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
    y: Tensor = _LoraLinear.apply(x, W_OI, bias_O, A, B, scaling, dropout)  # type: ignore[no-untyped-call]
    return y


def low_rank(x: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float, *, bias_O: Tensor | None, dropout: float) -> Tensor:
    """``scaling * (B A drop(x) + bias)`` for an (..., I) input, in its dtype: the update without W."""
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    return F.linear(dropout_.dropped_linear(x, A_RI.to(x.dtype), dropout), B_OR.to(x.dtype), bias_O) * scaling
