"""The numbers of an update against the same numbers of the dense matrix, and against closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from veneer.adapters import spectrum
from veneer.adapters.lowrank import spectrum_of, spectrum_of_product
from veneer.adapters.updates import LayerUpdate
from veneer.core.errors import UsageError


def factors(r: int, inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, inputs, generator=generator), torch.randn(outputs, r, generator=generator)


def directions(A: Tensor, B: Tensor) -> spectrum.Directions:
    return spectrum.directions(spectrum_of_product(A, B), A.shape[0])


# The last: more rank than there are inputs.
@pytest.mark.parametrize(("r", "inputs", "outputs"), [(1, 7, 5), (4, 30, 20), (4, 20, 30), (6, 4, 9), (12, 4, 5)])
def test_directions_are_those_of_the_dense_update(r: int, inputs: int, outputs: int) -> None:
    A, B = factors(r, inputs, outputs)
    dense = B.double() @ A.double()
    found = directions(A, B)
    assert found.rank == min(r, inputs, outputs)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(dense)[: found.rank], rtol=1e-12, atol=0)
    torch.testing.assert_close((found.left * found.values) @ found.right.T, dense, rtol=0, atol=1e-12)
    for columns in (found.left, found.right):
        torch.testing.assert_close(columns.T @ columns, torch.eye(found.rank).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero", ["A", "B", "row"])
def test_what_rounding_makes_is_no_direction(zero: str) -> None:
    A, B = (factor.double() for factor in factors(3, 10, 8))
    if zero == "row":
        A[2] = A[0] + 2 * A[1]
    else:
        (A if zero == "A" else B).zero_()
    assert directions(A, B).rank == (2 if zero == "row" else 0)


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 6), (6, 9)])
def test_the_leading_directions_of_a_dense_update(inputs: int, outputs: int) -> None:
    dense = torch.randn(outputs, inputs, dtype=torch.float64)
    found = spectrum.directions(spectrum_of(dense), 2)
    U, values, Vh = torch.linalg.svd(dense)
    torch.testing.assert_close(found.values, values[:2])
    torch.testing.assert_close(found.left @ found.left.T, U[:, :2] @ U[:, :2].T)
    torch.testing.assert_close(found.right @ found.right.T, Vh[:2].T @ Vh[:2])


def test_effective_rank() -> None:
    equal = torch.full((5,), 0.3, dtype=torch.float64)
    assert spectrum.effective_rank(equal) == pytest.approx(5)
    assert spectrum.effective_rank(torch.tensor([2.0])) == pytest.approx(1)
    assert spectrum.effective_rank(torch.empty(0)) == 0
    # Shares 3/4 and 1/4: exp(-(3/4) ln (3/4) - (1/4) ln (1/4)) = 4 / 3^(3/4).
    assert spectrum.effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.5, math.pi / 4, 1.5, math.pi / 2])
def test_principal_angles_of_planes_with_a_known_angle(angle: float) -> None:
    # Two planes of R^4 that share one line; their other lines are ``angle`` apart.
    first = torch.eye(4, 2, dtype=torch.float64)
    second = first.clone()
    second[1, 1], second[2, 1] = math.cos(angle), math.sin(angle)
    turned = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    found = spectrum.principal_angles(turned @ first, turned @ second)
    torch.testing.assert_close(found, torch.tensor([0.0, angle], dtype=torch.float64), rtol=1e-9, atol=1e-14)


def test_principal_angles_of_a_line_and_a_plane() -> None:
    plane = torch.eye(3, 2, dtype=torch.float64)
    line = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64) / math.sqrt(2)
    for first, second in ((plane, line), (line, plane)):
        assert spectrum.principal_angles(first, second).tolist() == pytest.approx([math.pi / 4])


def test_similarity_is_the_papers() -> None:
    first, second = (torch.linalg.qr(torch.randn(12, k, dtype=torch.float64)).Q for k in (3, 5))
    found = spectrum.subspace_similarity(first, second)
    assert found.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            norm = torch.linalg.matrix_norm(first[:, : i + 1].T @ second[:, : j + 1]) ** 2
            assert found[i, j].item() == pytest.approx(norm.item() / min(i + 1, j + 1))
    # φ over all columns is the mean of the squared cosines of the principal angles.
    cosines = spectrum.principal_angles(first, second).cos()
    assert found[2, 4].item() == pytest.approx(cosines.square().mean().item())
    torch.testing.assert_close(torch.diagonal(spectrum.subspace_similarity(first, first)), torch.ones(3).double())


def test_inner_product_is_that_of_the_dense_updates() -> None:
    (A, B), (C, D) = factors(2, 9, 7), factors(4, 9, 7, seed=1)
    one, other = (B.double() @ A.double()), (D.double() @ C.double())
    wanted = float((one * other).sum())
    for first in (spectrum_of_product(A, B), spectrum_of(one)):
        for second in (spectrum_of_product(C, D), spectrum_of(other)):
            assert spectrum.inner_product(first, second) == pytest.approx(wanted, rel=1e-12)


def update(path: str, A: Tensor, B: Tensor, *, whole: bool = True, weight_norm: float | None = None) -> LayerUpdate:
    norms = (float(A.norm()), float(B.norm()))
    shape = (B.shape[0], A.shape[1])
    decompose = partial(spectrum_of_product, A, B)
    return LayerUpdate(path, shape, A.shape[0], 2.0, norms, decompose, whole, weight_norm)


def test_an_adapters_spectrum() -> None:
    A, B = factors(3, 10, 8)
    updates = [
        update("a", A, B, weight_norm=4.0),
        update("b", A, 2 * B),
        update("c", A, 0.9e-3 * B),
        update("d", A, 1.1e-3 * B),
        update("zero", A, 0 * B, whole=False),
    ]
    found = spectrum.adapter_spectrum(updates)
    norm = float((B.double() @ A.double()).norm())
    # Of those above zero the norms are 1, 2, 0.0009 and 0.0011 times this one.
    assert found.median_norm == pytest.approx(norm * (1 + 1.1e-3) / 2)
    assert found.dead == ("zero",)
    third = spectrum.adapter_spectrum(updates[:3])
    assert third.median_norm == pytest.approx(norm)
    assert third.dead == ("c",)
    assert (found.whole, third.whole) == (False, True)
    first = found.layers[0]
    wanted = torch.linalg.svdvals(B.double() @ A.double())[:3]
    assert first.singular_values == pytest.approx(wanted.tolist(), rel=1e-12)
    assert first.effective_rank == pytest.approx(spectrum.effective_rank(wanted))
    energies = (wanted.square().cumsum(0) / wanted.square().sum()).tolist()
    for share, rank in ((0.9, first.rank_90), (0.95, first.rank_95), (0.99, first.rank_99)):
        assert energies[rank - 1] >= share
        assert rank == 1 or energies[rank - 2] < share
    assert (first.path, first.shape, first.r, first.scaling) == ("a", (8, 10), 3, 2.0)
    assert (first.a_norm, first.b_norm) == (float(A.norm()), float(B.norm()))
    assert first.update_norm == pytest.approx(norm)
    assert first.relative_norm == pytest.approx(norm / 4)
    assert found.layers[1].relative_norm is None
    zero = found.layers[-1]
    assert (zero.update_norm, zero.singular_values, zero.effective_rank, zero.rank_99) == (0, (), 0, 0)


def test_an_adapter_that_is_zero_everywhere() -> None:
    A, B = factors(3, 10, 8)
    found = spectrum.adapter_spectrum([update("a", A, 0 * B), update("b", 0 * A, B)])
    assert found.median_norm == 0
    assert found.dead == ("a", "b")


def test_the_overlap_of_two_adapters() -> None:
    (A, B), (C, D) = factors(2, 9, 7), factors(4, 9, 7, seed=1)
    found = spectrum.adapter_overlap(
        [update("a", A, B), update("b", A, B), update("same", A, B), update("first", A, B)],
        [update("b", C, 0 * D), update("a", C, D), update("same", -3 * A, B), update("second", C, D)],
    )
    assert (found.only_first, found.only_second) == (("first",), ("second",))
    a, b, same = found.layers
    one, other = (B.double() @ A.double()).flatten(), (D.double() @ C.double()).flatten()
    assert a.cosine == pytest.approx(float(one @ other / (one.norm() * other.norm())))
    assert a.ranks == (2, 4)
    for angles, phi, chance, first, second in (
        (a.angles_in, a.phi_in, a.chance_in, A.T, C.T),
        (a.angles_out, a.phi_out, a.chance_out, B, D),
    ):
        bases = [torch.linalg.qr(columns.double()).Q for columns in (first, second)]
        cosines = torch.linalg.svdvals(bases[0].T @ bases[1])
        assert angles == pytest.approx(cosines.clamp(max=1).acos().rad2deg().tolist(), abs=1e-6)
        assert phi == pytest.approx(float(cosines.square().mean()))
        assert chance == 4 / first.shape[0]
    assert (b.cosine, b.angles_in, b.phi_in, b.phi_out, b.ranks) == (0, (), None, None, (2, 0))
    assert same.cosine == pytest.approx(-1)
    assert same.phi_in == pytest.approx(1)
    assert same.angles_out == pytest.approx((0, 0), abs=1e-6)
    assert found.phi_in == pytest.approx((a.phi_in + 1) / 2)
    assert found.chance_out == pytest.approx((4 / 7 + 2 / 7) / 2)
    together = [torch.cat([one, one, one]), torch.cat([other, 0 * other, -3 * one])]
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(*together, dim=0)))


def test_chance_is_what_random_directions_have() -> None:
    generator = torch.Generator().manual_seed(5)
    pairs = [(torch.randn(2, 40, generator=generator), torch.randn(5, 40, generator=generator)) for _ in range(300)]
    ones = torch.ones(3, 5)
    layers = [
        spectrum.adapter_overlap([update("a", A, ones[:, :2] + torch.eye(3, 2))], [update("a", C, torch.eye(3, 5))])
        for A, C in pairs
    ]
    mean = sum(layer.phi_in for layer in layers) / len(layers)
    # The second one's product has rank 3: its B has three rows.
    assert layers[0].chance_in == pytest.approx(3 / 40)
    assert mean == pytest.approx(3 / 40, rel=0.1)


def test_adapters_that_cannot_be_compared() -> None:
    (A, B), (C, D) = factors(2, 9, 7), factors(2, 8, 7)
    with pytest.raises(UsageError, match="no layer in common: a, and b"):
        spectrum.adapter_overlap([update("a", A, B)], [update("b", A, B)])
    with pytest.raises(UsageError, match=r"different models: on 'a' .* is 7 x 9, that of the other 7 x 8"):
        spectrum.adapter_overlap([update("a", A, B)], [update("a", C, D)])
