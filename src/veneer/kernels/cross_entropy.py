"""A frozen head and the cross entropy behind it, in chunks, for inputs of half precision.

torch's ``linear_cross_entropy`` sums in the dtype of its input, which is too narrow in half precision. Here the
products are in that dtype and all else in float32. A frozen head needs no gradient, so that of the input is made of the
chunk's logits while they are there: nothing is computed twice, and of the logits nothing is kept.

Shape legend: N supervised tokens, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        W_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        scale: float,
        cap: float | None,
        chunk: int,
    ) -> Tensor:
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=h_ND.device)
        d_ND = torch.empty_like(h_ND)
        # One buffer for the logits of all chunks: memory that is new costs more than what is computed in it.
        room_CV = torch.empty(min(chunk, len(h_ND)), len(W_VD), dtype=wide, device=h_ND.device)
        for h_CD, targets_C, d_CD in zip(*(torch.split(x, chunk) for x in (h_ND, targets_N, d_ND)), strict=True):
            x_CV = room_CV[: len(h_CD)].copy_(F.linear(h_CD, W_VD, bias_V))
            if scale != 1.0:
                x_CV.mul_(scale)
            slope_CV = None
            if cap is not None:
                x_CV.div_(cap).tanh_()
                slope_CV = 1 - x_CV.square()
                x_CV.mul_(cap)
            x_CV.sub_(x_CV.amax(-1, keepdim=True))
            chosen_C1 = targets_C[:, None]
            right_C1 = x_CV.gather(1, chosen_C1)
            sums_C1 = x_CV.exp_().sum(-1, keepdim=True)
            total += (sums_C1.log() - right_C1).sum()
            # softmax(x) - onehot(target) is the gradient of the logits.
            g_CV = x_CV.div_(sums_C1)
            g_CV.scatter_add_(1, chosen_C1, torch.full_like(sums_C1, -1.0))
            if slope_CV is not None:
                g_CV.mul_(slope_CV)
            d_CD.copy_(g_CV.to(h_CD.dtype) @ W_VD)
        ctx.save_for_backward(d_ND if scale == 1.0 else d_ND.mul_(scale))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (d_ND,) = ctx.saved_tensors
        return (d_ND * grad).to(d_ND.dtype), None, None, None, None, None, None


def linear_cross_entropy(
    h_ND: Tensor,
    W_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    scale: float = 1.0,
    cap: float | None = None,
    chunk: int = 256,
) -> Tensor:
    """The summed cross entropy of the logits ``cap * tanh(scale * (W h + bias) / cap)``.

    >>> linear_cross_entropy(h, head.weight, None, targets).backward()

    Args:
        h_ND: what the head reads; its gradient is computed in the forward pass.
        W_VD: the head's frozen weight, in the dtype of h.
        bias_V: its frozen bias, likewise.
        targets_N: int64, the right token of each.
        scale: what the logits are multiplied with.
        cap: how large they can become; None leaves them at ``scale * (W h + bias)``.
        chunk: tokens whose logits exist at a time.

    Returns:
        The sum, a scalar in float32, or in float64 for an input of that.
    """
    total: Tensor = _LinearCrossEntropy.apply(h_ND, W_VD, bias_V, targets_N, scale, cap, chunk)  # type: ignore[no-untyped-call]
    return total
