"""The best approximation of lower rank, against the dense SVD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from veneer.adapters.lowrank import check_rank, missed_by, spectrum_of, spectrum_of_product
from veneer.core.errors import UsageError

SHAPES = [(12, 20), (20, 12), (9, 9), (1, 7), (7, 1)]


def dense(shape: tuple[int, int], *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def best(matrix: Tensor, r: int) -> Tensor:
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vt[:r]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_updates(shape: tuple[int, int], dtype: torch.dtype) -> None:
    update = dense(shape).to(dtype)
    spectrum = spectrum_of(update)
    torch.testing.assert_close(spectrum.values, torch.linalg.svdvals(update.double()), rtol=0, atol=1e-7)
    for r in (1, min(shape), min(shape) + 3):
        A, B = spectrum.factors(r)
        assert A.shape == (r, shape[1])
        assert B.shape == (shape[0], r)
        torch.testing.assert_close(B @ A, best(update, r), rtol=0, atol=1e-7)


def test_dense_updates_wider_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.adapters.lowrank._BLOCK", 5)
    for shape in ((6, 23), (23, 6)):
        torch.testing.assert_close(
            spectrum_of(dense(shape)).values, torch.linalg.svdvals(dense(shape)), rtol=0, atol=1e-7
        )


@pytest.mark.parametrize(("rows", "columns", "r"), [(12, 20, 4), (20, 12, 4), (5, 6, 9), (6, 5, 5)])
def test_products(rows: int, columns: int, r: int) -> None:
    A, B = dense((r, columns)).float(), dense((rows, r), seed=1).float()
    product = B.double() @ A.double()
    spectrum = spectrum_of_product(A, B)
    count = min(rows, columns, r)
    torch.testing.assert_close(spectrum.values[:count], torch.linalg.svdvals(product)[:count], rtol=1e-12, atol=1e-12)
    for k in (1, 3, r, r + 2):
        found_A, found_B = spectrum.factors(k)
        assert (found_A.shape, found_B.shape) == ((k, columns), (rows, k))
        torch.testing.assert_close(found_B @ found_A, best(product, k), rtol=0, atol=1e-12)


def test_both_layouts_of_the_factors() -> None:
    spectrum = spectrum_of(dense((8, 5)))
    A, B = spectrum.factors(3, balanced=False)
    torch.testing.assert_close(A @ A.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(B.norm(dim=0), spectrum.values[:3])
    A, B = spectrum.factors(3)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    torch.testing.assert_close(A.norm(dim=1) ** 2, spectrum.values[:3])


def test_energy_and_error_are_those_of_the_approximation() -> None:
    update = dense((8, 11))
    spectrum = spectrum_of(update)
    assert spectrum.energy == pytest.approx(float(update.norm() ** 2), rel=1e-12)
    for r in range(1, 9):
        missed = float((update - best(update, r)).norm() / update.norm())
        assert spectrum.error(r) == pytest.approx(missed, abs=1e-7)
        assert spectrum.kept(r) == pytest.approx(1 - missed**2, abs=1e-12)
    assert spectrum.error(8) == 0.0


def test_the_rank_for_a_share_of_the_energy() -> None:
    spectrum = spectrum_of(torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0])))
    # Squares 16, 4, 1, 1: shares 16/22, 20/22, 21/22, 1.
    assert [spectrum.rank_for(share) for share in (0.5, 16 / 22, 0.73, 20 / 22, 0.95, 0.99, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        4,
        4,
    ]
    assert spectrum.rank_for(1e-9) == 1
    assert spectrum.rank_for(7) == 7


@pytest.mark.parametrize("shape", [(300, 340), (340, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_triplets_of_a_large_update(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.adapters.lowrank._LARGE", 300)
    falling = torch.logspace(0, -3, 300, dtype=torch.float64)
    update = (torch.linalg.qr(dense((shape[0], 300)))[0] * falling @ torch.linalg.qr(dense((shape[1], 300)))[0].T).to(
        dtype
    )
    whole, few = spectrum_of(update), spectrum_of(update, 5)
    assert len(few.values) == 5
    torch.testing.assert_close(few.values, whole.values[:5], rtol=1e-5, atol=0)
    assert few.energy == pytest.approx(whole.energy, rel=1e-6)
    assert few.kept(5) == pytest.approx(whole.kept(5), abs=1e-6)
    missed = missed_by(update, *few.factors(5))
    assert missed == pytest.approx(missed_by(update, *whole.factors(5)), rel=1e-6)
    assert few.error(5) == pytest.approx(missed / math.sqrt(whole.energy), rel=1e-4)
    # More than a sixteenth of them: the whole spectrum.
    assert len(spectrum_of(update, 19).values) == 300


def test_what_factors_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    update, A, B = dense((37, 9)), dense((3, 9), seed=1), dense((37, 3), seed=2)
    wanted = float((update - B @ A).norm())
    assert missed_by(update, A, B) == pytest.approx(wanted, rel=1e-12)
    monkeypatch.setattr("veneer.adapters.lowrank._BLOCK", 80)
    assert missed_by(update, A, B) == pytest.approx(wanted, rel=1e-12)


def test_an_update_of_zeros() -> None:
    for spectrum in (spectrum_of(torch.zeros(4, 3)), spectrum_of_product(dense((2, 3)), torch.zeros(4, 2))):
        assert (spectrum.rank_for(0.9), spectrum.kept(1), spectrum.error(1)) == (1, 1.0, 0.0)
        A, B = spectrum.factors(2)
        assert not (B @ A).any()
        assert A.isfinite().all()


def test_a_float32_matrix_of_low_rank_is_kept_to_its_own_rounding() -> None:
    exact = (dense((200, 3)) @ dense((3, 150), seed=1)).float()
    A, B = spectrum_of(exact).factors(3)
    assert float((B.float() @ A.float() - exact).norm() / exact.norm()) < 3e-7


@pytest.mark.parametrize("rank", [0, -1, True, 0.0, 1.5, -0.1, "8", float("nan")])
def test_what_is_no_rank(rank: object) -> None:
    with pytest.raises(UsageError, match="The rank is"):
        check_rank(rank)  # type: ignore[arg-type]
