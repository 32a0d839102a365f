"""What an update is made of: its singular values, its effective rank, and how two updates lie to each other.

Shape legend: I inputs, O outputs, R rank, K singular values above zero.

An update B A is never built as an (O, I) matrix. With the QR factorisations Aᵀ = Q_A R_A and B = Q_B R_B,

    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ

so the singular values of the (R, R) matrix in the middle are those of the update. All of it is done in float64:
the stored factors are exact there, so what is reported is the file's content and not the rounding of the report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Directions:
    """The singular value decomposition of an update, without its zero part. Float64, values descending."""

    values: Tensor
    """(K,) singular values above rounding."""
    left: Tensor
    """(O, K) orthonormal columns: the directions that the update writes to."""
    right: Tensor
    """(I, K) orthonormal columns: the directions that the update reads from."""

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return self.values.numel()

    @property
    def norm(self) -> float:
        """The Frobenius norm of the update."""
        return float(self.values.norm())


def directions(A_RI: Tensor, B_OR: Tensor, scaling: float = 1.0) -> Directions:
    """The decomposition of ``scaling * B A``, in time linear in I and O.

    >>> A, B = torch.eye(2, 5), torch.ones(3, 2)
    >>> directions(A, B).values
    tensor([2.4495], dtype=torch.float64)
    """
    Q_A, R_A = torch.linalg.qr(A_RI.double().T)
    Q_B, R_B = torch.linalg.qr(B_OR.double())
    U, values, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return _above_rounding(Q_B @ U, values * abs(scaling), Q_A @ Vh.T * math.copysign(1.0, scaling))


def dense_directions(update_OI: Tensor) -> Directions:
    """The decomposition of an update that is no product of thin factors, such as DoRA's. Cubic in min(O, I)."""
    U, values, Vh = torch.linalg.svd(update_OI.double(), full_matrices=False)
    return _above_rounding(U, values, Vh.T)


def _above_rounding(left: Tensor, values: Tensor, right: Tensor) -> Directions:
    """Numpy's rule for the rank of a matrix: what rounding alone could have made is not a direction."""
    bound = values.amax() * max(left.shape[0], right.shape[0]) * torch.finfo(values.dtype).eps
    kept = int((values > bound).sum())
    return Directions(values[:kept], left[:, :kept], right[:, :kept])


def effective_rank(values_K: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum; 0 for an update that is zero.

    It is K when all are equal and near 1 when one outweighs the rest. Roy and Vetterli, "The effective rank",
    EUSIPCO 2007.
    """
    if not values_K.numel():
        return 0.0
    share = values_K / values_K.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


def energy_rank(values_K: Tensor, share: float) -> int:
    """The smallest number of directions whose squared singular values are at least this share of all of them."""
    if not values_K.numel():
        return 0
    kept = values_K.square().cumsum(0)
    # Sums of the same numbers in another order may differ in the last place: 100 % is then never reached.
    enough = kept >= share * kept[-1] * (1 - 1e-12)
    return int(enough.int().argmax()) + 1


def principal_angles(first_NK: Tensor, second_NL: Tensor) -> Tensor:
    """The angles between the spaces that orthonormal columns span, in radians, ascending; min(K, L) of them.

    Both the cosine and the sine of each angle are computed, so that small angles are as exact as large ones
    (Björck and Golub, "Numerical methods for computing angles between linear subspaces", 1973).
    """
    wide, thin = (first_NK, second_NL) if first_NK.shape[1] >= second_NL.shape[1] else (second_NL, first_NK)
    shared = wide.T @ thin
    cosines = torch.linalg.svdvals(shared)
    sines = torch.linalg.svdvals(thin - wide @ shared).flip(0)
    return torch.atan2(sines, cosines)


def subspace_similarity(first_NK: Tensor, second_NL: Tensor) -> Tensor:
    """The LoRA paper's φ(i, j) for every i and j, as a (K, L) matrix with values from 0 to 1.

    φ(i, j) is the squared Frobenius norm of U_iᵀ V_j divided by min(i, j), where U_i and V_j are the first i and
    j columns: 1 when the smaller space lies in the larger one, 0 when they are orthogonal (section 7.2).
    """
    K, L = first_NK.shape[1], second_NL.shape[1]
    overlap = (first_NK.T @ second_NL).square().cumsum(0).cumsum(1)
    smaller = torch.minimum(torch.arange(1, K + 1).unsqueeze(1), torch.arange(1, L + 1))
    return overlap / smaller


def cosine(first: Directions, second: Directions) -> float:
    """The cosine of the angle between two updates as vectors; 0 when either is zero."""
    if not first.rank or not second.rank:
        return 0.0
    inner = (first.left.T @ second.left) * (first.right.T @ second.right)
    return float(first.values @ inner @ second.values) / (first.norm * second.norm)
