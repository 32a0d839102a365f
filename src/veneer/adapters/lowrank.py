"""The best approximation of an update by one of lower rank, and how much of the update that keeps.

By the theorem of Eckart, Young and Mirsky the first r singular triples of a matrix are its closest matrix of rank r
in the Frobenius norm, and what they miss is the sum of the squares of the other singular values. The *energy* that
they keep is ``sum(S[:r] ** 2) / sum(S ** 2)``.

Shape legend: O outputs, I inputs, R rank of the factors, N = min(O, I), K singular values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from veneer.core.errors import UsageError
from veneer.kernels.svd import leading_svd

Rank = int | float
"""A whole number is a rank; a number from above 0 to 1 is the share of the energy to keep, as in PEFT."""

_BLOCK = 4096
# From this size on, and for at most this share of all triplets, looking for the leading ones alone is faster.
_LARGE, _SHARE = 1024, 16


@final
@dataclass(frozen=True)
class Spectrum:
    """The singular values of an update, with what is needed to build its best approximations."""

    values: Tensor
    """(K,) in float64, largest first; those that are not in it are zero."""
    left: Tensor | None
    """(O, K) orthonormal columns."""
    right: Tensor | None
    """(K, I) orthonormal rows."""
    update: Tensor | None = None
    """(O, I): what the side that is None is made from."""
    total: float | None = None
    """The sum of the squares of all singular values, when ``values`` holds only the leading ones."""

    @property
    def energy(self) -> float:
        """The sum of the squares of all singular values: the squared Frobenius norm."""
        return float(self.values.square().sum()) if self.total is None else self.total

    def rank_for(self, rank: Rank) -> int:
        """The rank that is asked for: itself, or the smallest one that keeps a share of the energy; at least 1.

        Raises:
            UsageError: neither a whole number from 1 nor a share from above 0 to 1.
        """
        check_rank(rank)
        if isinstance(rank, int):
            return rank
        reached = self.values.square().cumsum(0)
        # Compared with the last partial sum, not with a sum taken in another order: a share of 1 is then reached.
        return int(torch.searchsorted(reached, rank * reached[-1])) + 1 if float(reached[-1]) > 0 else 1

    def kept(self, r: int) -> float:
        """The share of the energy in the first ``r`` singular values; 1 for an update that is zero."""
        return 1.0 - self.error(r) ** 2

    def error(self, r: int) -> float:
        """The relative Frobenius error of the approximation of rank ``r``."""
        energy = self.energy
        if self.total is None:
            missed = float(self.values[r:].square().sum())
        else:
            missed = max(0.0, self.total - float(self.values[:r].square().sum()))
        return math.sqrt(missed / energy) if energy else 0.0

    def factors(self, r: int, *, balanced: bool = True) -> tuple[Tensor, Tensor]:
        """A (r, I) and B (O, r) in float64 with ``B A`` the best approximation of rank ``r``.

        Above the number of singular values the rest is filled with zeros, which changes nothing.

        Args:
            r: the rank.
            balanced: share each singular value evenly between A and B, so that both survive a narrow dtype;
                otherwise A has orthonormal rows and B carries the singular values, as in PEFT.
        """
        k = min(r, len(self.values))
        S = self.values[:k]
        U, Vt = self.vectors(k)
        root = S.sqrt()
        A, B = (root[:, None] * Vt, U * root) if balanced else (Vt, U * S)
        if r > k:
            A = torch.cat([A, A.new_zeros(r - k, A.shape[1])])
            B = torch.cat([B, B.new_zeros(B.shape[0], r - k)], 1)
        return A, B

    def vectors(self, k: int) -> tuple[Tensor, Tensor]:
        """The first ``k`` singular vectors: (O, k) orthonormal columns and (k, I) orthonormal rows."""
        U = None if self.left is None else self.left[:, :k]
        Vt = None if self.right is None else self.right[:k]
        inverse = torch.where(self.values > 0, 1 / self.values, 0)[:k]
        if U is None:
            assert Vt is not None
            assert self.update is not None
            U = (self.update.double() @ Vt.T) * inverse
        if Vt is None:
            assert self.update is not None
            Vt = (U.T @ self.update.double()) * inverse[:, None]
        return U, Vt


def check_rank(rank: Rank) -> None:
    """Refuse what is neither a rank nor a share of the energy.

    Raises:
        UsageError: it is not.
    """
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    if whole and rank < 1:
        raise UsageError(f"The rank is {rank}; expected a whole number of at least 1.")
    if not whole and not (isinstance(rank, float) and 0 < rank <= 1):
        raise UsageError(f"The rank is {rank!r}; expected a whole number, or a share of the energy from above 0 to 1.")


def spectrum_of_product(A_RI: Tensor, B_OR: Tensor, *, driver: str | None = None) -> Spectrum:
    """The spectrum of ``B A``, without building it: QR of both factors, then the SVD of an (R, R) matrix.

    Computed in float64: the singular values are exact to 1e-16 of the largest, far below a float32 factor's rounding.

    Args:
        A_RI: (R, I).
        B_OR: (O, R).
        driver: see ``torch.linalg.svd``; only for CUDA tensors.
    """
    Q_B, R_B = torch.linalg.qr(B_OR.double())
    Q_A, R_A = torch.linalg.qr(A_RI.double().T)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False, driver=driver)
    return Spectrum(S, Q_B @ U, Vt @ Q_A.T)


def spectrum_of(update_OI: Tensor, r: int | None = None) -> Spectrum:
    """The spectrum of a dense update, from the eigenvalues of its (N, N) Gram matrix in float64.

    The eigenvalues are the squares of the singular values, exact to 1e-16 of the largest one; so singular values
    are exact where they count, and those below 1.5e-8 of the largest drown. Rounding a matrix to float32 drowns them
    already below 6e-8, so nothing that the update knew is lost, and this takes a fraction of the time of an SVD.
    Approximations are projections of the update itself onto the leading eigenvectors, and as exact as these.

    Where only a few singular triplets of a large matrix are asked for, these alone are found by block Lanczos, which
    is many times faster. They span the leading subspace to a measured angle of at most 1e-4, so that what they keep
    is less than 1e-8 of it short of the most there is.

    Args:
        update_OI: (O, I) in any floating-point dtype; it is not copied.
        r: how many leading triplets are needed; None for the whole spectrum.
    """
    O, I = update_OI.shape  # noqa: E741 - the legend's letters
    if r is not None and min(O, I) >= _LARGE and r * _SHARE <= min(O, I):
        found = leading_svd(update_OI.to(torch.promote_types(update_OI.dtype, torch.float32)), r, tolerance=1e-4)
        energy = sum(float(rows.double().square().sum()) for rows in torch.split(update_OI, _BLOCK // 8))
        return Spectrum(found.S.double(), found.U.double(), found.Vh.double(), total=energy)
    tall = O > I
    gram = update_OI.new_zeros(min(O, I), min(O, I), dtype=torch.float64)
    # In blocks, so that no copy of the whole in float64 is made.
    for block in torch.split(update_OI, _BLOCK, dim=0 if tall else 1):
        wide = block.double()
        gram += wide.T @ wide if tall else wide @ wide.T
    eigenvalues, vectors = torch.linalg.eigh(gram)
    values = eigenvalues.flip(0).clamp_(min=0).sqrt_()
    vectors = vectors.flip(1)
    left, right = (None, vectors.T) if tall else (vectors, None)
    return Spectrum(values, left, right, update_OI)


def missed_by(update_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> float:
    """The Frobenius norm of ``update - B A`` with the factors as they are, summed up in float64 block by block."""
    A = A_RI.double()
    squares = [
        float((rows.double() - factor.double() @ A).square().sum())
        for rows, factor in zip(torch.split(update_OI, _BLOCK // 8), torch.split(B_OR, _BLOCK // 8), strict=True)
    ]
    return math.sqrt(sum(squares))
