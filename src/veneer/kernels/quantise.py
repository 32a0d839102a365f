"""Weights rounded to what 4-bit NF4 and 8-bit integers can hold, read back at once. The codes are not kept."""

from __future__ import annotations

import torch
from torch import Tensor

# The 16 values of NF4: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK = 64
"""Weights that share a scale, in the order of memory."""


def nf4_rounded(W: Tensor) -> Tensor:
    """The nearest weight that NF4 can hold: each block of 64 is scaled by its largest absolute value.

    Args:
        W: float32 or wider, of any shape.

    Returns:
        A new tensor of the shape and dtype of ``W``.
    """
    code = torch.tensor(NF4, dtype=W.dtype, device=W.device)
    flat = W.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    middles = (code[1:] + code[:-1]) / 2
    nearest = code[torch.bucketize(blocks / scale, middles)]
    return (nearest * scale).view(-1)[: flat.numel()].view(W.shape)


def int8_rounded(W_OI: Tensor) -> Tensor:
    """The nearest weight that 8-bit integers can hold: each row is scaled by its largest absolute value."""
    largest = W_OI.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest)) / 127
    return (W_OI / scale).round() * scale
