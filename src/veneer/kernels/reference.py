"""The truth that every kernel is tested and benchmarked against: plain PyTorch, written for reading.

Shape legend: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x_NI: Tensor,
    W_OI: Tensor,
    bias_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    scaling: float,
    dropped_NI: Tensor | None = None,
) -> Tensor:
    """``W x + bias + scaling * B A x``; ``dropped_NI`` replaces x before A when given."""
    through_A_NR = F.linear(x_NI if dropped_NI is None else dropped_NI, A_RI)
    return F.linear(x_NI, W_OI, bias_O) + scaling * F.linear(through_A_NR, B_OR)


def row_norms(W_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scaling: float) -> Tensor:
    """The norms of the rows of ``W + scaling * B A``."""
    W = W_OI + scaling * B_OR @ A_RI
    return W.square().sum(1).sqrt().detach()


def scale_rows(u: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``scale * (u - bias) + bias``, exactly ``u`` where the scale is one."""
    return u * scale if bias is None else u * scale + (1 - scale) * bias


def rms_norm(x: Tensor, w_D: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + w)``."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + w_D)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x * cos + (-b, a) * sin`` for the halves (a, b) of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def adapted_linear(
    x: Tensor, W_OI: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, s: float
) -> Tensor:
    """``W x + bias``, with ``s * B A x`` where there are factors."""
    return F.linear(x, W_OI, bias) if A is None or B is None else lora_linear(x, W_OI, bias, A, B, s)
