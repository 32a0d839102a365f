"""The fast SVD finds the subspace of LAPACK's float64 decomposition to its tolerance, whatever the spectrum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.kernels.svd import full_svd, leading_svd


def gaussian(O: int, I: int, seed: int = 0) -> Tensor:  # noqa: E741 - outputs, inputs
    return torch.randn(O, I, generator=torch.Generator().manual_seed(seed))


def with_spectrum(values: Tensor, O: int, I: int) -> Tensor:  # noqa: E741
    k = len(values)
    U, V = (torch.linalg.qr(gaussian(n, k, seed).double())[0] for n, seed in ((O, 1), (I, 2)))
    return (U * values.double() @ V.t()).float()


k = torch.arange(1, 401, dtype=torch.float64)
SPECTRA = {
    "a random matrix, flat": gaussian(450, 400),
    "slow decay": with_spectrum(k**-0.5, 450, 400),
    "like a trained weight: a few large values on a flat bulk": gaussian(400, 500)
    + 30 * with_spectrum(k[:12] ** -1, 400, 500),
    "fast decay": with_spectrum(0.9**k, 400, 450),
    "wide": gaussian(300, 1200),
    "tall": gaussian(1200, 300),
}


def sine(A: Tensor, B: Tensor) -> float:
    """Of the largest angle between the spans of two sets of orthonormal columns."""
    A, B = A.double(), B.double()
    return float(torch.linalg.matrix_norm(B - A @ (A.t() @ B), 2))


@pytest.fixture(autouse=True)
def search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search in matrices that are small enough for a test."""
    monkeypatch.setattr("veneer.kernels.svd._SMALL", 100)


@pytest.mark.parametrize("r", [1, 8, 30])
@pytest.mark.parametrize("name", SPECTRA)
def test_subspace_is_within_the_tolerance_of_the_exact_one(name: str, r: int) -> None:
    W = SPECTRA[name]
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    found = leading_svd(W, r)
    assert sine(U[:, :r], found.U) < 1e-3
    assert sine(Vh[:r].t(), found.Vh.t()) < 1e-3
    torch.testing.assert_close(found.S.double(), S[:r], rtol=1e-5, atol=1e-6 * float(S[0]))
    for basis in (found.U.t(), found.Vh):
        torch.testing.assert_close(basis @ basis.t(), torch.eye(r), rtol=0, atol=1e-5)
    # The bound that it reports holds, as far as its dtype can tell.
    rounding = 20 * torch.finfo(torch.float32).eps * float(S[0] / (S[r - 1] - S[r]))
    assert max(sine(U[:, :r], found.U), sine(Vh[:r].t(), found.Vh.t())) <= found.angle + rounding


@pytest.mark.parametrize("tolerance", [1e-1, 1e-6])
def test_a_tolerance_costs_what_it_asks_for(tolerance: float) -> None:
    W = SPECTRA["slow decay"].double()
    U = torch.linalg.svd(W)[0]
    found = leading_svd(W, 8, tolerance=tolerance)
    assert found.angle <= tolerance
    assert sine(U[:, :8], found.U) <= tolerance
    assert found.U.dtype == torch.float64


def test_at_least_so_many_steps_are_made() -> None:
    W = SPECTRA["slow decay"]
    U = torch.linalg.svd(W.double())[0]
    few, many = (leading_svd(W, 4, tolerance=0.3, least=least) for least in (0, 9))
    assert sine(U[:, :4], many.U) < 0.1 * sine(U[:, :4], few.U)


def test_the_whole_of_a_small_matrix() -> None:
    W = gaussian(40, 30)
    assert all(torch.equal(a, b) for a, b in zip(leading_svd(W, 5)[:3], full_svd(W, 5)[:3], strict=True))
    U, S, Vh, angle = full_svd(W, 5)
    assert (U.shape, S.shape, Vh.shape, angle) == ((40, 5), (5,), (5, 30), 0.0)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_matrix_of_lower_rank_than_asked_for(rank: int) -> None:
    W = with_spectrum(k[:rank], 300, 320) if rank else torch.zeros(300, 320)
    found = leading_svd(W, 6)
    torch.testing.assert_close(found.U * found.S @ found.Vh, W, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.Vh @ found.Vh.t(), torch.eye(6), rtol=0, atol=1e-5)


def test_the_result_depends_on_the_matrix_alone() -> None:
    W = SPECTRA["wide"]
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(leading_svd(W, 4))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:3], results[1][:3], strict=True))
