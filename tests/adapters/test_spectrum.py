"""The numbers of an update against the same numbers of the dense matrix, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from veneer.adapters import spectrum
from veneer.adapters.lowrank import spectrum_of, spectrum_of_product


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


def test_cosine_is_that_of_the_dense_updates() -> None:
    (A, B), (C, D) = factors(2, 9, 7), factors(4, 9, 7, seed=1)
    wanted = torch.nn.functional.cosine_similarity((B @ A).double().flatten(), (D @ C).double().flatten(), dim=0)
    first, second = directions(A, B), directions(C, D)
    assert spectrum.cosine(first, second) == pytest.approx(wanted.item(), rel=1e-5)
    assert spectrum.cosine(first, directions(A, -0.5 * B)) == pytest.approx(-1)
    assert spectrum.cosine(first, directions(A, torch.zeros_like(B))) == 0
