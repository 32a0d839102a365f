"""A quantised linear layer with a low-rank update, forward and backward written out.

The frozen product is the library's own. For its backward W is read again, so that neither the dequantised weight nor
a full-size intermediate result is kept: only the input and ``x A^T`` are; what dropout took is drawn again.

Shape legend: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.base import QuantisedBase
from veneer.kernels import dropout as dropout_
from veneer.kernels.lora_linear import add_update, dropped_input, input_gradients, low_rank


class _LoraQuantised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        scaling: float,
        p: float,
        product: Callable[[Tensor], Tensor],
        read: Callable[[], Tensor],
    ) -> Tensor:
        ctx.scaling, ctx.read = scaling * dropout_.weight(p), read
        y = product(x)
        xA_RN = add_update(y.view(-1, y.shape[-1]), dropped_input(ctx, x, p), A_RI, B_OR, ctx.scaling)
        # The input is kept for A's gradient alone, and what comes out of A for B's.
        keep_in, keep_out = ctx.needs_input_grad[2:4]
        ctx.save_for_backward(x if keep_in else None, xA_RN if keep_out else None, A_RI, B_OR)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xA_RN, A_RI, B_OR = ctx.saved_tensors
        need_x, need_bias, _, need_B = ctx.needs_input_grad[:4]
        g_NO = grad.reshape(-1, grad.shape[-1])
        gB_RN = (B_OR.t() @ g_NO.t()).mul_(ctx.scaling)
        d_B = (xA_RN @ g_NO).t().mul(ctx.scaling).contiguous() if need_B else None
        through_W = g_NO @ ctx.read().to(g_NO.dtype) if need_x else None
        d_x, d_A = input_gradients(ctx, x, A_RI, gB_RN, through_W)
        d_bias = g_NO.sum(0, dtype=ctx.bias_dtype) if need_bias else None
        return d_x, d_bias, d_A, d_B, None, None, None, None


def lora_quantised(
    x: Tensor,
    bias_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    scaling: float,
    *,
    product: Callable[[Tensor], Tensor],
    read: Callable[[], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """``product(x) + scaling * B A drop(x)``, with the gradients of ``W x + bias`` for the frozen product.

    >>> lora_quantised(x, layer.bias, A, B, 2.0, product=layer, read=lambda: dequantise(layer.weight))

    Args:
        x: (..., I) input.
        bias_O: the bias that ``product`` adds, only so that it gets its gradient.
        A_RI: first factor; it is the thin one, so it follows x in dtype.
        B_OR: second factor, likewise.
        scaling: the factor of the update.
        product: gives ``W x + bias`` in a new tensor, in the dtype of x.
        read: gives W as (O, I) in floating point, for the backward pass.
        dropout: the share of x that A does not see.

    Returns:
        (..., O) output in the dtype of x.
    """
    if torch.is_autocast_enabled(x.device.type):
        # Which product runs in which precision is autocast's to choose.
        y = product(x)
        return y + low_rank(x, A_RI, B_OR, scaling, bias_O=None, dropout=dropout).to(y.dtype)
    A, B = A_RI.to(x.dtype), B_OR.to(x.dtype)
    if not torch.is_grad_enabled():
        y = product(x)
        add_update(y.view(-1, y.shape[-1]), F.dropout(x, dropout) if dropout else x, A, B, scaling)
        return y
    if dropout and not dropout_.repeatable(x):
        return product(x) + low_rank(x, A, B, scaling, bias_O=None, dropout=dropout)
    out: Tensor = _LoraQuantised.apply(x, bias_O, A, B, scaling, dropout, product, read)  # type: ignore[no-untyped-call]
    return out


def quantised_adapted(
    base: QuantisedBase,
    x: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    scaling: float,
    *,
    bias_O: Tensor | None,
    dropout: float,
    readable: bool = True,
) -> Tensor:
    """``InputBase.adapted`` of a quantised layer: in one function where the layer may be called as one.

    Args:
        base: the layer.
        x: (..., I) input.
        A_RI: first factor.
        B_OR: second factor.
        scaling: the factor of the update.
        bias_O: a bias beside B, or None.
        dropout: the share of x that A does not see.
        readable: whether the layer gives its weight back, for the backward pass.
    """
    if not readable or not runs_plain(base.module):
        y = base.frozen(x)
        return y + low_rank(x, A_RI, B_OR, scaling, bias_O=bias_O, dropout=dropout).to(y.dtype)
    y = lora_quantised(x, base.bias(), A_RI, B_OR, scaling, product=base.frozen, read=base.weight, dropout=dropout)
    return y if bias_O is None else y + (bias_O * scaling).to(y.dtype)


def runs_plain(module: nn.Module) -> bool:
    """Whether a module's output is a new tensor that nobody else sees: no hook on it, no replaced forward."""
    return (
        "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )
