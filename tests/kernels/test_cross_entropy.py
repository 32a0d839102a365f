"""The loss of a frozen head against torch's cross entropy of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from veneer.kernels.cross_entropy import linear_cross_entropy

N, D, V = 11, 6, 17


def given(dtype: torch.dtype = torch.float64, *, bias: bool = False):
    drawn = torch.Generator().manual_seed(0)
    h, W, b = (torch.randn(shape, generator=drawn, dtype=torch.float64) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(0, V, (N,), generator=drawn)
    return h.to(dtype).requires_grad_(), W.to(dtype), b.to(dtype) if bias else None, targets


def whole(h, W, b, targets, scale: float = 1.0, cap: float | None = None):
    x = F.linear(h, W, b) * scale
    return F.cross_entropy(x if cap is None else torch.tanh(x / cap) * cap, targets, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 2.5), (3.0, 2.5)])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient(chunk: int, scale: float, cap: float | None, bias: bool) -> None:
    h, W, b, targets = given(bias=bias)
    expected = whole(h, W, b, targets, scale, cap)
    (of_whole,) = torch.autograd.grad(expected * 0.5, h)
    loss = linear_cross_entropy(h, W, b, targets, scale=scale, cap=cap, chunk=chunk)
    (of_chunks,) = torch.autograd.grad(loss * 0.5, h)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(of_chunks, of_whole)


def test_gradcheck() -> None:
    h, W, b, targets = given(bias=True)
    assert torch.autograd.gradcheck(lambda x: linear_cross_entropy(x, W, b, targets, scale=0.5, cap=3.0, chunk=4), h)


def test_in_bfloat16_all_but_the_products_is_float32() -> None:
    h, W, _, targets = given(torch.bfloat16)
    loss = linear_cross_entropy(h, W, None, targets, chunk=4)
    assert loss.dtype == torch.float32
    # As with logits that a model gives in bfloat16, and whose loss is taken in float32.
    expected = F.cross_entropy(F.linear(h, W).float(), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = torch.autograd.grad(loss, h), torch.autograd.grad(expected, h)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


def test_large_logits_do_not_overflow() -> None:
    h, W, _, targets = given(torch.float32)
    with torch.no_grad():
        h *= 1e4
    loss = linear_cross_entropy(h, W, None, targets)
    torch.testing.assert_close(loss, whole(h, W, None, targets))
    assert torch.isfinite(torch.autograd.grad(loss, h)[0]).all()


def test_without_a_graph() -> None:
    h, W, _, targets = given()
    torch.testing.assert_close(linear_cross_entropy(h.detach(), W, None, targets), whole(h, W, None, targets))
