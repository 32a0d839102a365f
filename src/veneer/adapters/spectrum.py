"""What an update is made of: its directions, its effective rank, and how two updates lie to each other.

Shape legend: I inputs, O outputs, K directions of an update, L of another one.

An update is described by its singular value decomposition, which ``lowrank`` takes from the factors alone. All of it
is float64: stored factors are exact there, so what is reported is the file's content and no rounding of the report.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.adapters.lowrank import Spectrum


@dataclass(frozen=True)
class Directions:
    """The singular value decomposition of an update, without its zero part."""

    values: Tensor
    """(K,) singular values, descending."""
    left: Tensor
    """(O, K) orthonormal columns: the directions that the update writes to."""
    right: Tensor
    """(I, K) orthonormal columns: the directions that the update reads from."""

    @property
    def rank(self) -> int:
        """How many directions there are."""
        return self.values.numel()


def directions(spectrum: Spectrum, most: int) -> Directions:
    """The leading directions of an update: at most so many, and none that rounding alone could have made.

    The bound is numpy's for the rank of a matrix: the largest singular value times the longer side times epsilon.
    """
    left, right = spectrum.vectors(most)
    values = spectrum.values[:most]
    bound = spectrum.values.max() * max(left.shape[0], right.shape[1]) * torch.finfo(values.dtype).eps
    kept = int((values > bound).sum())
    return Directions(values[:kept], left[:, :kept], right[:kept].T)


def effective_rank(values_K: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum; 0 for an update that is zero.

    It is K when all are equal and near 1 when one outweighs the rest. Roy and Vetterli, "The effective rank",
    EUSIPCO 2007.
    """
    if not values_K.numel():
        return 0.0
    share = values_K / values_K.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))


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
    return float(first.values @ inner @ second.values / (first.values.norm() * second.values.norm()))
