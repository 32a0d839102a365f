"""The written-out backward against autograd over the plain formula, with a weight that is read when it is needed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.kernels import reference
from veneer.kernels.lora_quantised import lora_quantised, runs_plain

N, I, O, R = (2, 3), 6, 5, 2  # noqa: E741


def given(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {"x": torch.randn(*N, I), "A": torch.randn(R, I), "B": torch.randn(O, R), "bias": torch.randn(O)}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}


W = torch.randn(O, I, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def found(p: dict[str, Tensor], dropout: float = 0.0, **weight: Tensor) -> Tensor:
    here = weight.get("W", W)
    return lora_quantised(
        p["x"],
        p["bias"],
        p["A"],
        p["B"],
        1.5,
        product=lambda x: F.linear(x, here, p["bias"]),
        read=lambda: here,
        dropout=dropout,
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_are_those_of_the_formula(dropout: float) -> None:
    p = given()
    torch.manual_seed(3)
    y = found(p, dropout)
    torch.manual_seed(3)
    dropped = F.dropout(p["x"], dropout) if dropout else None
    expected = reference.lora_linear(p["x"], W, p["bias"], p["A"], p["B"], 1.5, dropped)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), list(p.values()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(p.values()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_without_a_graph_the_output_is_the_same() -> None:
    p = given()
    with torch.no_grad():
        assert torch.equal(found(p), found(p))
        quiet = found(p)
    assert torch.equal(quiet, found(p))


def test_only_the_input_and_its_product_with_a_are_kept() -> None:
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        found(given())
    assert sorted(kept) == sorted([(*N, I), (R, 6), (R, I), (O, R)])


def test_under_autocast_the_output_keeps_the_dtype_of_the_product() -> None:
    p = given(torch.float32)
    exact = found(p, W=W.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_quantised(
            p["x"], None, p["A"], p["B"], 1.5, product=lambda x: x @ W.float().t(), read=lambda: W.float()
        )
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert p["A"].grad.dtype == torch.float32
    # A handful of products, each of terms that are rounded to bfloat16.
    bound = 16 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (y.float() + p["bias"] - exact).abs().max() <= bound


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_module_with_a_hook_does_not_run_plain(hook: str) -> None:
    module = nn.Linear(2, 2)
    assert runs_plain(module)
    handle = getattr(module, hook)(lambda *_: None)
    assert not runs_plain(module)
    handle.remove()
    assert runs_plain(module)
    module.forward = lambda x: x
    assert not runs_plain(module)
