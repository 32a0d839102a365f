"""Dropout by the generator's state: the masks of PyTorch, the gradients of its formula, and nothing large kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.kernels import dropout
from veneer.kernels.lora_linear import low_rank
from veneer.kernels.lora_quantised import lora_quantised

N, I, O, R = 200, 16, 12, 2  # noqa: E741
RATES = [0.1, 0.5, 0.9, 1.0]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def seeded(function, *arguments) -> Tensor:
    torch.manual_seed(5)
    return function(*arguments)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_elements_fall_as_with_torchs_own(p: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, N, I).to(dtype).requires_grad_()
    found, expected = seeded(dropout.drop, x, p), seeded(F.dropout, x, p)
    assert found.dtype == dtype
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(y, x, weights)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(seeded(dropout.drop, x, p), expected)


def test_a_mask_is_drawn_again_from_its_state_and_moves_nothing() -> None:
    began = dropout.state_of(torch.device("cpu"))
    first = dropout.mask((N, I), 0.3, dtype=torch.float32, device=torch.device("cpu"))
    after = torch.get_rng_state()
    again = dropout.mask((N, I), 0.3, dtype=torch.float32, device=torch.device("cpu"), state=began)
    assert torch.equal(first, again)
    assert torch.equal(after, torch.get_rng_state())
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first, dropout.mask((N, I), 0.3, dtype=torch.float32, device=torch.device("cpu")))
    # A binomial count of N * I elements, five standard deviations wide.
    assert abs(float(first.mean()) - 0.7) < 5 * (0.3 * 0.7 / (N * I)) ** 0.5


def test_a_backward_pass_leaves_the_random_numbers_where_they_were() -> None:
    x = torch.randn(N, I, requires_grad=True)
    y = dropout.drop(x, 0.5)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_no_dropout_is_the_input_itself() -> None:
    x = torch.randn(3, requires_grad=True)
    assert dropout.drop(x, 0.0) is x


@pytest.mark.parametrize("p", [0.0, *RATES])
def test_the_product_of_what_is_left(p: float) -> None:
    x, A = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, I), (R, I)))
    found = seeded(dropout.dropped_linear, x, A, p)
    expected = F.linear(seeded(F.dropout, x, p), A)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, (x, A), weights), torch.autograd.grad(expected, (x, A), weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *both: seeded(dropout.dropped_linear, *both, p), (x[:1, :2], A))
    with torch.no_grad():
        torch.testing.assert_close(seeded(dropout.dropped_linear, x, A, p), expected, rtol=1e-12, atol=1e-12)


def test_the_product_under_autocast() -> None:
    x, A = torch.randn(N, I, requires_grad=True), torch.randn(R, I, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = seeded(dropout.dropped_linear, x, A, 0.5)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert (x.grad.dtype, A.grad.dtype) == (torch.float32, torch.float32)
    exact = F.linear(seeded(F.dropout, x, 0.5), A)
    # Two factors and the product are rounded to half an eps each; what is kept is twice as large.
    bound = 2 * torch.finfo(torch.bfloat16).eps * 2 * (x.abs() @ A.abs().t()).max()
    assert (y.float() - exact).abs().max() < bound


def kept_bytes(function) -> int:
    """The bytes of all that autograd keeps, each storage once."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    del y
    return sum(found.values())


W, BIAS = torch.randn(O, I), torch.randn(O)


def through_a_quantised_layer(x: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return lora_quantised(x, None, A, B, 1.0, product=lambda x: F.linear(x, W), read=lambda: W, dropout=p)


def alone(x: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return low_rank(x, A, B, 1.0, bias_O=None, dropout=p)


@pytest.mark.parametrize("layer", [through_a_quantised_layer, alone])
def test_dropout_keeps_not_a_byte_more_than_none(layer) -> None:
    x, A, B = (torch.randn(*shape, requires_grad=True) for shape in ((N, I), (R, I), (O, R)))
    assert kept_bytes(lambda: layer(x, A, B, 0.5)) == kept_bytes(lambda: layer(x, A, B, 0.0))
    plain = kept_bytes(lambda: F.linear(F.linear(F.dropout(x, 0.5), A), B))
    assert plain - kept_bytes(lambda: layer(x, A, B, 0.5)) >= x.nbytes - W.nbytes


def test_dropout_for_itself_keeps_nothing() -> None:
    x = torch.randn(N, I, requires_grad=True)
    assert kept_bytes(lambda: dropout.drop(x, 0.5)) == 0
    assert kept_bytes(lambda: F.dropout(x, 0.5)) == x.nbytes
