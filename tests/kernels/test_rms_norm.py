from __future__ import annotations

import pytest
import torch

from veneer.kernels import reference
from veneer.kernels.rms_norm import rms_norm

SHAPES = [(5, 4), (2, 3, 4), (4,), (0, 4)]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], offset: float) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, dtype=torch.float64)
    found, expected = rms_norm(x, w, 1e-6, offset), reference.rms_norm(x, w, 1e-6, offset)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    (got,), (wanted,) = (torch.autograd.grad(y, x, weights) for y in (found, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, w, 1e-6, offset), found)


def test_gradcheck() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, w, 1e-6, 1.0), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, offset: float) -> None:
    x = (torch.randn(64, 32) * 100).to(dtype).requires_grad_()
    w = torch.randn(32).to(dtype)
    found = rms_norm(x, w, 1e-6, offset)
    assert found.dtype == dtype
    exact = reference.rms_norm(x.double(), w.double(), 1e-6, offset)
    # Two roundings, one of them before the weight.
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.dtype == dtype


def test_it_keeps_its_input_and_a_number_a_row() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    w = torch.randn(4)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        rms_norm(x, w, 1e-6)
    assert sorted(t.numel() for t in kept if t is not w) == [6, 24]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
