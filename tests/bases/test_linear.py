"""nn.Linear as a base: the fused path is taken only when it is the same as calling the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from veneer import LoraConfig, get_peft_model
from veneer.bases.linear import Base


class Doubling(nn.Linear):
    """A linear layer that does more than its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def adapt(layer: nn.Module, **fields: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **fields)
    return get_peft_model(nn.Sequential(layer), config).eval()


def update(model: Any, x: Tensor) -> Tensor:
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * x @ A.t() @ B.t()


def test_a_subclass_keeps_its_own_forward() -> None:
    layer, x = Doubling(4, 3), torch.randn(5, 4)
    expected = layer(x)
    model = adapt(layer)
    torch.testing.assert_close(model(x), expected + update(model, x))


def test_a_replaced_forward_is_called() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    model = adapt(layer)
    layer.forward = lambda x: F.linear(x, layer.weight) + 7
    torch.testing.assert_close(model(x), layer.forward(x) + update(model, x))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_hooks_on_the_frozen_layer_run(kind: str, merged: bool) -> None:
    layer, calls = nn.Linear(4, 3), []
    getattr(layer, f"register_{kind}_hook")(lambda *args: calls.append(kind))
    model = adapt(layer)
    if merged:
        model.merge_adapter()
    model(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert calls == [kind]


def test_the_input_gradient_is_the_same_with_and_without_hooks() -> None:
    layer, x = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    model = adapt(layer)
    fused = torch.autograd.grad(model(x).square().sum(), x)[0]
    layer.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], fused, rtol=1e-12, atol=1e-12)


def test_what_is_accepted() -> None:
    assert Base.accepts(nn.Linear(2, 2))
    assert Base.accepts(Doubling(2, 2))
    assert not Base.accepts(nn.Bilinear(2, 2, 2))
    assert not Base.accepts(nn.Embedding(2, 2))
    assert not Base.accepts(parametrizations.weight_norm(nn.Linear(2, 2)))
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert not Base.accepts(packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_every_active_adapter_computes_in_it(dtype: torch.dtype) -> None:
    model = adapt(nn.Linear(4, 3).to(dtype))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_bias=True))
    model.set_adapter(["default", "second"])
    x = torch.randn(5, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
