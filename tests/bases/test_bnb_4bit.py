"""bitsandbytes' 4-bit layer as a base, against bitsandbytes' own functions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veneer
from veneer.adapters.index import ModuleIndex
from veneer.adapters.kbit import bytes_per_weight, quantised_slots
from veneer.bases.bnb_4bit import Base

bnb = pytest.importorskip("bitsandbytes")
KINDS = pytest.mark.parametrize(("kind", "nested"), [(k, n) for k in ("nf4", "fp4") for n in (True, False)])


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def layer(kind: str = "nf4", nested: bool = True, out: int = 32, inputs: int = 64, dtype: Any = torch.float32) -> Any:
    plain = nn.Linear(inputs, out, dtype=dtype)
    quantised = bnb.nn.Linear4bit(inputs, out, compute_dtype=dtype, compress_statistics=nested, quant_type=kind)
    quantised.to(dtype).load_state_dict(plain.state_dict())
    return quantised.to("cpu")


@KINDS
def test_weight_is_bitsandbytes_own_and_requantised_alike(kind: str, nested: bool) -> None:
    module = layer(kind, nested)
    base = Base(module)
    assert torch.equal(base.weight(), bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state))
    assert base.shape() == (32, 64)
    assert base.placement() == (torch.device("cpu"), torch.float32)
    other = torch.randn(32, 64)
    base.replace(other)
    packed, state = bnb.functional.quantize_4bit(other, compress_statistics=nested, quant_type=kind)
    assert torch.equal(module.weight.data, packed)
    assert torch.equal(base.weight(), bnb.functional.dequantize_4bit(packed, state))
    assert module.quant_state is module.weight.quant_state
    assert module.weight.quant_state.nested == nested


@KINDS
def test_gradient_of_the_input_flows_through_the_frozen_product(kind: str, nested: bool) -> None:
    model = Holder(layer(kind, nested))
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(r=4, target_modules="all-linear"))
    nn.init.normal_(model.layer.lora_B["default"].weight)
    x = torch.randn(3, 64, requires_grad=True)
    adapted(x).square().sum().backward()
    base = model.layer.base
    W = base.weight() + model.layer.change("default").detach()
    other = x.detach().clone().requires_grad_()
    F.linear(other, W, model.layer.base_layer.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4 * float(other.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weight_has_the_dtype_that_was_quantised(dtype: torch.dtype) -> None:
    base = Base(layer(dtype=dtype))
    assert base.weight().dtype == base.placement()[1] == dtype
    base.replace(base.weight())
    assert base.weight().dtype == dtype


def test_before_it_is_quantised_the_weight_is_the_plain_one() -> None:
    module = bnb.nn.Linear4bit(64, 32)
    base = Base(module)
    assert torch.equal(base.weight(), module.weight)
    assert base.placement()[1] == torch.float32
    base.replace(torch.ones(32, 64))
    assert torch.equal(module.to("cpu")(torch.ones(1, 64)).detach(), 64 + module.bias.detach()[None])
    assert Base(module).weight().unique().tolist() == [1.0]


def test_hooks_and_replaced_forwards_run() -> None:
    model = Holder(layer())
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    x = torch.randn(3, 64)
    before = adapted(x)
    seen: list[torch.Tensor] = []
    model.layer.base_layer.register_forward_hook(lambda module, given, out: seen.append(out))
    torch.testing.assert_close(adapted(x), before)
    assert torch.equal(seen[0], model.layer.base_layer(x))


def rewritten(module: Any) -> None:
    """What a call in evaluation mode does on a processor with bfloat16 instructions."""
    module.weight.data, module.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        module.weight.data, module.weight.quant_state
    )


@KINDS
def test_a_rewritten_weight_is_read_and_written_back_with_a_warning(kind: str, nested: bool) -> None:
    module = layer(kind, nested, out=64, inputs=128)
    before = Base(module).weight()
    packed = module.weight.data.clone()
    rewritten(module)
    read = Base(module).weight()
    assert module.weight.quant_state.packing_format_for_cpu
    # Its scales are rounded to bfloat16, and those of nested ones rounded to 8 bits a second time.
    assert ((read - before).abs() <= (2**-8 + 2**-5 * nested) * before.abs().max()).all()
    model = Holder(module)
    with pytest.warns(UserWarning, match="1 quantised layers were called in evaluation mode before"):
        adapted = veneer.get_peft_model(model, veneer.LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(module.weight.data, packed)
    assert torch.equal(model.layer.base.weight(), read)
    x = torch.randn(2, 128, requires_grad=True)
    adapted(x).sum().backward()
    assert x.grad is not None


def test_layers_that_are_not_adapted_are_kept_as_they_are_too() -> None:
    model = nn.Sequential(layer(out=64), layer())
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(5, 64)
    trained = adapted(x).detach()
    with torch.no_grad():
        assert torch.equal(adapted.eval()(x), trained)
    adapted.train()(x).sum().backward()
    expected = F.linear(torch.ones(5, 32), Base(model[1]).weight().t())
    update = model[0]
    grad_B = expected.t() @ (x @ update.lora_A["default"].weight.t()) * update.scaling["default"]
    torch.testing.assert_close(update.lora_B["default"].weight.grad, grad_B, rtol=1e-4, atol=1e-4)


def test_bytes_a_weight_are_those_of_the_closed_form() -> None:
    """Half a byte, a byte of scale for 64 weights, 4 bytes for 256 scales, an offset, and two tables."""
    model = nn.Sequential(layer(out=1024, inputs=1024))
    weights = 1024 * 1024
    tables = 16 * 4 + 256 * 4 + 4
    expected = weights / 2 + weights / 64 + 4 * weights / (64 * 256) + tables
    found = bytes_per_weight(quantised_slots(ModuleIndex(model)))
    assert found == expected / weights
    assert found <= 0.53
    assert bytes_per_weight(quantised_slots(ModuleIndex(nn.Sequential(nn.Linear(2, 2))))) is None


def test_parameters_are_counted_as_weights_not_as_bytes() -> None:
    adapted = veneer.get_peft_model(Holder(layer()), veneer.LoraConfig(r=2, target_modules="all-linear"))
    trainable, total = adapted.get_nb_trainable_parameters()
    assert (trainable, total) == (2 * (32 + 64), 32 * 64 + 32 + 2 * (32 + 64))
    assert adapted.match_report.total == total


def test_accepting_imports_nothing_and_takes_the_subclasses() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Base.accepts(bnb.nn.LinearNF4(64, 32))
        assert Base.accepts(bnb.nn.LinearFP4(64, 32))
        assert not Base.accepts(nn.Linear(64, 32))
        assert not Base.accepts(bnb.nn.Linear8bitLt(64, 32))
