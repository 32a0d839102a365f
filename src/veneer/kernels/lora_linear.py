"""A linear layer with a low-rank update, forward and backward written out.

Autograd's own graph of ``W x + s B(A x)`` keeps several intermediate results and adds two full-size
outputs. Here the update is added into W's fresh output in place, and only the input of A and ``x A^T`` are
kept for backward. W is frozen, so nothing is kept for its gradient.

Shape legend: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.kernels import reference


def add_update(y_NO: Tensor, in_A: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """Add ``scaling * B A x`` into ``y_NO`` in place; returns ``A x^T`` as (R, N)."""
    # With the thin factor on the left, a product of it is two to three times as fast on a CPU.
    xA_RN = A_RI @ in_A.reshape(-1, in_A.shape[-1]).t()
    y_NO.addmm_(xA_RN.t(), B_OR.t(), alpha=scaling)
    return xA_RN


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        W_OI: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        in_A = x if dropped is None else dropped
        y_NO = F.linear(x.reshape(-1, x.shape[-1]), W_OI, bias_O)
        xA_RN = add_update(y_NO, in_A, A_RI, B_OR, scaling)
        # The input is kept for A's gradient alone, and what comes out of A for B's.
        *_, keep_in, keep_out, _ = ctx.needs_input_grad
        ctx.save_for_backward(in_A if keep_in else None, xA_RN if keep_out else None, W_OI, A_RI, B_OR)
        ctx.scaling, ctx.shape = scaling, in_A.shape
        ctx.has_dropped = dropped is not None
        return y_NO.view(*x.shape[:-1], W_OI.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        in_A, xA_RN, W_OI, A_RI, B_OR = ctx.saved_tensors
        need_x, need_dropped, _, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        g_NO = grad.reshape(-1, grad.shape[-1])
        gB_RN = (B_OR.t() @ g_NO.t()).mul_(ctx.scaling)
        d_x = d_dropped = d_bias = d_A = d_B = None
        if need_B:
            d_B = (xA_RN @ g_NO).t().mul(ctx.scaling).contiguous()
        if need_A:
            d_A = gB_RN @ in_A.reshape(-1, in_A.shape[-1])
        if need_x:
            d_x = g_NO @ W_OI
            if not ctx.has_dropped:
                d_x.addmm_(gB_RN.t(), A_RI)
            d_x = d_x.view(ctx.shape)
        if need_dropped:
            d_dropped = (gB_RN.t() @ A_RI).view(ctx.shape)
        if need_bias:
            d_bias = g_NO.sum(0)
        return d_x, d_dropped, None, d_bias, d_A, d_B, None


def lora_linear(
    x: Tensor,
    W_OI: Tensor,
    bias_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    scaling: float,
    dropped: Tensor | None = None,
) -> Tensor:
    """``W x + bias + scaling * B A x`` for inputs of any leading shape.

    Args:
        x: (..., I) input; its dtype, or autocast's, is the dtype of the computation and the result.
        W_OI: frozen weight. One that requires a gradient is computed by the reference instead.
        bias_O: the layer's bias, trainable or not.
        A_RI: first factor, in any floating dtype: it is the thin one, so it follows x and not x it.
        B_OR: second factor, likewise.
        scaling: the factor of the update.
        dropped: x after dropout, when the update sees another input than W.

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
        add_update(y_NO, (x if dropped is None else dropped).to(dtype), A, B, scaling)
        return y_NO.view(*x.shape[:-1], W_OI.shape[0])
    if W_OI.requires_grad:
        return reference.lora_linear(x, W_OI, bias_O, A, B, scaling, dropped)
    if autocast:
        x, W_OI = x.to(dtype), W_OI.to(dtype)
        dropped = None if dropped is None else dropped.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
    y: Tensor = _LoraLinear.apply(x, dropped, W_OI, bias_O, A, B, scaling)  # type: ignore[no-untyped-call]
    return y


def low_rank(x: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float, *, bias_O: Tensor | None, dropout: float) -> Tensor:
    """``scaling * (B A drop(x) + bias)`` for an (..., I) input, in its dtype: the update without W."""
    if dropout:
        x = F.dropout(x, dropout)
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    return F.linear(F.linear(x, A_RI.to(x.dtype)), B_OR.to(x.dtype), bias_O) * scaling
