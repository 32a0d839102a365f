"""bitsandbytes' 8-bit layer as a base, against bitsandbytes' own functions and the rounding that int8 means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veneer
from veneer.adapters.index import ModuleIndex
from veneer.adapters.kbit import bytes_per_weight, quantised_slots
from veneer.bases.bnb_8bit import Base

bnb = pytest.importorskip("bitsandbytes")


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def layer(out: int = 32, inputs: int = 64) -> Any:
    quantised = bnb.nn.Linear8bitLt(inputs, out, has_fp16_weights=False, threshold=6.0)
    quantised.load_state_dict(nn.Linear(inputs, out).state_dict())
    return quantised.to("cpu")


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "after-a-call"])
def test_weight_is_bitsandbytes_own_wherever_its_scales_are(called: bool) -> None:
    """They stand beside the weight until the first call, and in the layer's state after it."""
    module = layer()
    scales = module.weight.SCB.clone()
    if called:
        module(torch.randn(1, 64))
        assert module.weight.SCB is None
    base = Base(module)
    expected = bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
    torch.testing.assert_close(base.weight(), expected, rtol=1e-6, atol=0)
    assert base.shape() == (32, 64)
    assert base.placement() == (torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "after-a-call"])
def test_a_replaced_weight_is_rounded_to_a_127th_of_its_row(called: bool) -> None:
    module = layer()
    if called:
        module(torch.randn(1, 64))
    base = Base(module)
    other = torch.randn(32, 64)
    base.replace(other)
    step = other.abs().amax(1, keepdim=True) / 127
    # Half a step, and the weight is read in float16 first.
    assert ((base.weight() - other).abs() <= step * 0.5 + 2**-10 * other.abs().amax()).all()
    x = torch.randn(3, 64)
    torch.testing.assert_close(module.train()(x), F.linear(x, base.weight(), module.bias), rtol=1e-5, atol=1e-5)


def test_another_layers_state_is_not_touched() -> None:
    module = layer()
    module(torch.randn(1, 64))
    before = (module.state, module.state.CB, module.state.SCB)
    adapted = veneer.get_peft_model(Holder(module), veneer.LoraConfig(target_modules="all-linear"))
    adapted.merge_adapter(into="requantised")
    merged = adapted.base_model.model.layer.base_layer
    assert merged is not module
    merged(torch.randn(1, 64))
    assert all(now is then for now, then in zip((module.state, module.state.CB, module.state.SCB), before, strict=True))


def test_gradient_of_the_input_in_both_modes() -> None:
    model = Holder(layer())
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    W = model.layer.base.weight() + model.layer.change("default").detach()
    for training in (True, False):
        x = torch.randn(2, 3, 64, requires_grad=True)
        adapted.train(training)(x).sum().backward()
        torch.testing.assert_close(x.grad, W.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


def test_bytes_a_weight_are_one_and_a_scale_a_row() -> None:
    assert bytes_per_weight(quantised_slots(ModuleIndex(nn.Sequential(layer())))) == (32 * 64 + 32 * 4) / (32 * 64)


def test_a_layer_that_keeps_16_bits_is_no_such_base() -> None:
    assert not Base.accepts(bnb.nn.Linear8bitLt(64, 32))
    assert Base.accepts(layer())


def test_before_it_is_quantised_the_weight_is_the_plain_one() -> None:
    module = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    base = Base(module)
    assert torch.equal(base.weight(), module.weight)
    base.replace(torch.ones(32, 64))
    assert Base(module.to("cpu")).weight().unique().tolist() == [1.0]
