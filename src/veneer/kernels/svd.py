"""The leading singular triplets of a matrix without the whole decomposition, to a tolerance that is measured.

Shape legend: O outputs, I inputs, R wanted triplets, B block, M size of the searched space.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Below this size, or for a larger share of all triplets, the whole decomposition is as fast.
_SMALL, _SHARE = 384, 8

# Rounding leaves residuals of about three times the dtype's epsilon, relative to the largest singular value.
_FLOOR = 4


class Triplets(NamedTuple):
    """Singular triplets, the largest value first."""

    U: Tensor
    """(O, R), orthonormal columns."""
    S: Tensor
    """(R,)."""
    Vh: Tensor
    """(R, I), orthonormal rows."""
    angle: float
    """A bound on the sine of the angle to the true subspace, as it was measured; 0 for the whole decomposition."""


def full_svd(W_OI: Tensor, r: int) -> Triplets:
    """The leading ``r`` triplets, cut from LAPACK's whole decomposition."""
    U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    return Triplets(U[:, :r], S[:r], Vh[:r], 0.0)


def leading_svd(W_OI: Tensor, r: int, *, tolerance: float = 1e-3, least: int = 0) -> Triplets:
    """The leading ``r`` triplets by block Lanczos bidiagonalisation from a random block, until they are found.

    >>> U, S, Vh, angle = leading_svd(torch.randn(4096, 4096), 16)

    The space grows by a block of products with W and its transpose, and is cut back to its best part when it gets
    large. After a step the residual ``|W' u - s v|`` of each triplet is known for free. The search ends when the
    residuals divided by the gap to the next singular value, which bounds the angle to the true subspace (Wedin 1972),
    are within the tolerance; or when they are at the rounding of the dtype, where the true subspace is not defined
    any better. So the number of steps comes from the matrix: a few where the spectrum falls off quickly, many where
    it is flat. The random block has a seed of its own: the result depends on nothing but W.

    Golub, Luk and Overton 1981; restarts as in Baglama and Reichel 2005; random blocks as in Musco and Musco,
    arXiv 1504.05477.

    Args:
        W_OI: float32 or float64, on any device.
        r: how many, at most the smaller side of W.
        tolerance: the largest sine of the angle between the subspaces.
        least: how many steps to make in any case.
    """
    O, I = W_OI.shape  # noqa: E741 - the legend's letters
    if min(O, I) <= max(_SMALL, _SHARE * r):
        return full_svd(W_OI, r)
    block = 16
    most = min(r + 80 * block, min(O, I) // 2)
    tiny = torch.finfo(W_OI.dtype).eps
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(I, block, generator=generator, dtype=W_OI.dtype).to(W_OI.device)
    # Columns are stored as rows: a slice of the first ones then lies in one piece.
    U_MO, V_MI = W_OI.new_empty(most + block, O), W_OI.new_empty(most + block, I)
    C_MM = W_OI.new_zeros(most + block, most + block)
    next_BI = torch.linalg.qr(drawn)[0].t()
    # Thin products with a matrix that lies row by row are the fastest, in both directions.
    W_OI, W_IO = W_OI.contiguous(), W_OI.t().contiguous()
    size = steps = 0
    check, past = r + block, (0, math.inf)
    while True:
        new = slice(size, size + block)
        V_MI[new] = next_BI
        U_MO[new], C_MM[:size, new], C_MM[new, new] = _extend(U_MO[:size], (W_OI @ next_BI.t()).t())
        size, steps = size + block, steps + 1
        next_BI, _, last_BB = _extend(V_MI[:size], (W_IO @ U_MO[new].t()).t())
        if size < most and (size < check or steps < least):
            continue
        P, values, Qh = torch.linalg.svd(C_MM[:size, :size])
        residual = (last_BB @ P[-block:]).norm(dim=0)
        angle = _angle(values, residual, r)
        found = angle <= tolerance or float(residual[:r].max()) <= _FLOOR * tiny * float(values[0])
        if found and steps >= least:
            return Triplets(U_MO[:size].t() @ P[:, :r], values[:r], Qh[:r] @ V_MI[:size], angle)
        if size >= most:
            keep = r + 2 * block
            U_MO[:keep], V_MI[:keep] = P[:, :keep].t() @ U_MO[:size], Qh[:keep] @ V_MI[:size]
            C_MM.zero_()
            C_MM.diagonal()[:keep] = values[:keep]
            size, angle = keep, math.inf
        check = min(most, size + _wait(size, angle, past, tolerance, block))
        past = size, angle


def _extend(Q_MD: Tensor, Y_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis N of what the rows of Y add to those of Q: ``Y' = Q' above + N' corner``.

    Twice, as once leaves them not orthogonal enough.
    """
    above_MB = Q_MD @ Y_BD.t()
    N_DB, corner_BB = torch.linalg.qr((Y_BD - above_MB.t() @ Q_MD).t())
    again_MB = Q_MD @ N_DB
    N_DB, fix_BB = torch.linalg.qr(N_DB - Q_MD.t() @ again_MB)
    return N_DB.t(), above_MB + again_MB @ corner_BB, fix_BB @ corner_BB


def _wait(size: int, angle: float, past: tuple[int, float], tolerance: float, block: int) -> int:
    """By how many columns the space grows until it is looked at again: the angle falls by a like factor a column."""
    longest = max(block, size // 5)
    if not tolerance < angle < past[1] < math.inf:
        return longest
    columns = (size - past[0]) * math.log(angle / tolerance) / math.log(past[1] / angle)
    return min(longest, max(block, math.ceil(columns / block) * block))


def _angle(values: Tensor, residual: Tensor, r: int) -> float:
    """Wedin's bound: the residual of the wanted triplets over their distance from the rest."""
    gap = float(values[r - 1] - values[r])
    return float(residual[:r].norm()) / gap if gap > 0 else math.inf
