"""DoRA's kernels against the plain formulas: norms, values, gradients, and what is kept in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.kernels import reference
from veneer.kernels.dora import row_norms, scale_rows

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_norms_are_those_of_the_built_matrix(dtype: torch.dtype, transposed: bool) -> None:
    W, A, B = torch.randn(7, 9).to(dtype), torch.randn(3, 9), torch.randn(7, 3)
    if transposed:
        W = W.t().contiguous().t()
    if dtype == F64:
        A, B = A.double(), B.double()
    exact = reference.row_norms(W.double(), A.double(), B.double(), 0.7)
    found = row_norms(W, A.requires_grad_(), B, 0.7)
    assert found.dtype == (F64 if dtype == F64 else torch.float32)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), exact, rtol=1e-12 if dtype == F64 else 1e-5, atol=0)


def test_norms_under_autocast_are_the_same() -> None:
    W, A, B = torch.randn(7, 9), torch.randn(3, 9), torch.randn(7, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(row_norms(W, A, B, 0.7), row_norms(W.clone(), A, B, 0.7))
        inside = row_norms(W, A, B, 0.7)
    assert torch.equal(inside, row_norms(W, A, B, 0.7))


def test_a_row_that_the_update_cancels_has_no_negative_square() -> None:
    A, B = torch.randn(2, 9), torch.randn(50, 2)
    norms = row_norms(-(B @ A), A, B, 1.0)
    assert norms.isfinite().all()
    assert (norms <= 1e-2 * (B @ A).norm(dim=1)).all()


BIASES = [pytest.param(bias, id="bias" if bias else "no-bias") for bias in (False, True)]


def operands(shape: tuple[int, ...], like: tuple[int, ...], bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    u, scale = torch.randn(shape, dtype=F64), torch.randn(like, dtype=F64)
    return u, scale, torch.randn(like, dtype=F64) if bias else None


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("shape", "like"), [((5, 3), (3,)), ((2, 4, 3), (3,)), ((3,), (3,)), ((0, 3), (3,)), ((2, 3, 4, 5), (3, 1, 1))]
)
def test_values_and_gradients(shape: tuple[int, ...], like: tuple[int, ...], bias: bool) -> None:
    given = [tensor.requires_grad_() for tensor in operands(shape, like, bias) if tensor is not None]
    more = () if bias else (None,)
    # A copy, as the first operand is written over.
    y, expected = scale_rows(given[0] * 1, *given[1:], *more), reference.scale_rows(*given, *more)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), given)
    theirs = torch.autograd.grad((expected * weights).sum(), given)
    for gradient, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("learns", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_gradients_of_some(learns: tuple[int, ...], bias: bool) -> None:
    given = list(operands((5, 3), (3,), bias))
    wanted = [given[i].requires_grad_() for i in learns if given[i] is not None]
    if not wanted:
        return
    y = scale_rows(given[0] * 1, given[1], given[2])
    ours = torch.autograd.grad(y.square().sum(), wanted)
    theirs = torch.autograd.grad(reference.scale_rows(*given).square().sum(), wanted)
    for gradient, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_of_one_changes_no_bit(dtype: torch.dtype, bias: bool) -> None:
    u = torch.randn(50, 3).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y = scale_rows(u.clone(), torch.ones(3, dtype=wide), torch.randn(3).to(dtype) if bias else None)
    assert y.dtype == dtype
    assert torch.equal(y, u)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_of_zero_still_has_its_gradient(dtype: torch.dtype, bias: bool) -> None:
    u, scale = torch.randn(6, 2).to(dtype), torch.tensor([0.0, 2.0], requires_grad=True)
    b = torch.randn(2) if bias else None
    y = scale_rows(u.clone().requires_grad_() * 1, scale, b)
    y.sum().backward()
    expected = u.float().sum(0) - (0 if b is None else 6 * b)
    torch.testing.assert_close(scale.grad, expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert torch.allclose(y[:, 0].float(), torch.zeros(6) if b is None else b[0].expand(6), atol=1e-2)


def test_without_a_bias_nothing_but_the_output_is_kept() -> None:
    u, scale = torch.randn(50, 3), torch.rand(3) + 0.5
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    fresh = u.clone().requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = scale_rows(fresh, scale.requires_grad_(), None)
    large = [tensor for tensor in kept if tensor.numel() == u.numel()]
    assert [tensor.data_ptr() for tensor in large] == [y.data_ptr()] == [fresh.data_ptr()]


def test_compiles_without_a_graph_break() -> None:
    u, scale, bias = (tensor.requires_grad_() for tensor in operands((5, 3), (3,), True))
    compiled = torch.compile(scale_rows, fullgraph=True, backend="aot_eager")
    y, expected = compiled(u, scale, bias), reference.scale_rows(u, scale, bias)
    torch.testing.assert_close(y, expected)
    for one, other in zip(
        torch.autograd.grad(y.sum(), (u, scale, bias)),
        torch.autograd.grad(expected.sum(), (u, scale, bias)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
