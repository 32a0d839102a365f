"""Principal components batch by batch against the decomposition of all rows at once."""

from __future__ import annotations

import pytest
import torch

from veneer.kernels.directions import Directions


@pytest.fixture
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([9.0, 6, 4, 2, 0.1, 0.1, 0.1, 0.1])
    return torch.randn(240, 8, generator=generator) * scales + 50 * torch.randn(8, generator=generator)


@pytest.mark.parametrize("batches", [(240,), (100, 100, 40), (30,) * 8])
def test_components_are_those_of_all_rows(rows: torch.Tensor, batches: tuple[int, ...]) -> None:
    found = Directions(4)
    for batch in rows.split(list(batches)):
        found.add(batch)
    centred = rows.double() - rows.double().mean(0)
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert found.rows == 240
    torch.testing.assert_close(found.components.double().abs(), Vh[:4].abs(), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.singular_values.double(), S[:4], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.share.double(), S[:4] ** 2 / centred.square().sum(), rtol=1e-4, atol=0)
    largest = found.components.gather(1, found.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_half_rows_are_taken_in_float32(rows: torch.Tensor) -> None:
    found = Directions(2)
    found.add(rows.bfloat16())
    assert found.components.dtype == torch.float32


def test_rows_that_are_all_equal_have_no_share() -> None:
    found = Directions(2)
    found.add(torch.ones(5, 4))
    assert found.share.tolist() == [0, 0]
