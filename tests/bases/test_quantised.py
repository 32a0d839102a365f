"""Quantised layers of other libraries: torch's own, and modules with the outside of theirs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import veneer
from veneer.bases.quantised import _PACKAGES, Base
from veneer.core.errors import ConfigError, MergeError

CONFIG: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def packed(package: str, *, sizes: tuple[str, str] = ("out_features", "in_features"), graph: bool = True) -> nn.Module:
    """A layer that is a linear by its sizes and its output alone: its weight is in buffers, in an order of its own."""

    class QuantLinear(nn.Module):
        __module__ = f"{package}.nn_modules.qlinear" if package != "torch.ao.nn.quantized" else package

        def __init__(self) -> None:
            super().__init__()
            setattr(self, sizes[0], 5)
            setattr(self, sizes[1], 6)
            self.register_buffer("qweight", torch.randint(-8, 8, (6, 5), dtype=torch.int32))
            self.register_buffer("scales", torch.rand(1, 5).half())
            self.register_buffer("bias", torch.randn(5).half())

        def forward(self, x: Tensor) -> Tensor:
            W_IO = (self.qweight * self.scales).to(x.dtype)
            y = x @ W_IO + self.bias.to(x.dtype)
            return y if graph else y.detach()

    return QuantLinear()


@pytest.mark.parametrize("package", _PACKAGES)
def test_layers_are_known_by_their_package(package: str) -> None:
    assert Base.accepts(packed(package))
    assert not Base.accepts(packed(f"my_{package}"))


def test_other_modules_are_not_taken_for_layers() -> None:
    class Norm(nn.Module):
        __module__ = "awq.modules.norm"

    assert not Base.accepts(Norm())
    assert not Base.accepts(nn.Linear(6, 5))
    assert not Base.accepts(nn.Bilinear(3, 4, 5))


@pytest.mark.parametrize("sizes", [("out_features", "in_features"), ("outfeatures", "infeatures")])
def test_trains_through_its_output(sizes: tuple[str, str]) -> None:
    model = Holder(packed("auto_gptq", sizes=sizes))
    x = torch.randn(3, 6, requires_grad=True)
    frozen = model(x)
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(**CONFIG))
    layer: Any = model.layer
    assert torch.equal(adapted(x), frozen)
    assert {p.dtype for p in layer.tensors("default").values()} == {torch.float32}
    nn.init.normal_(layer.lora_B["default"].weight)
    A, B = (layer.tensors("default")[name] for name in ("lora_A.weight", "lora_B.weight"))
    expected = frozen + 2.0 * x @ A.t() @ B.t()
    torch.testing.assert_close(adapted(x), expected)
    ours = torch.autograd.grad(adapted(x).square().sum(), [x, A, B])
    theirs = torch.autograd.grad(expected.square().sum(), [x, A, B])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_layer_without_a_gradient_is_refused_when_one_is_needed() -> None:
    adapted = veneer.get_peft_model(Holder(packed("awq", graph=False)), veneer.LoraConfig(**CONFIG))
    adapted(torch.randn(3, 6)).sum().backward()
    with pytest.raises(ConfigError, match="A QuantLinear has no gradient for its input"):
        adapted(torch.randn(3, 6, requires_grad=True))


def test_a_weight_that_is_not_given_back_is_refused_by_name() -> None:
    def model() -> nn.Module:
        return Holder(packed("gptqmodel"))

    with pytest.raises(ConfigError, match=r"A gptqmodel.nn_modules.qlinear.QuantLinear does not give its weight back"):
        veneer.get_peft_model(model(), veneer.LoraConfig(**CONFIG, use_dora=True))
    adapted = veneer.get_peft_model(model(), veneer.LoraConfig(**CONFIG))
    with pytest.raises(MergeError, match=r"A gptqmodel.nn_modules.qlinear.QuantLinear does not give its weight back"):
        adapted.merge_and_unload(into="dequantised")
    with pytest.raises(MergeError, match=r"A QuantLinear cannot be given another weight"):
        adapted.merge_and_unload(into="requantised")
    with pytest.raises(MergeError, match="cannot be given another weight"):
        Base(model().layer).replace(torch.zeros(5, 6))


def dynamic() -> nn.Module:
    """torch's own int8 layer: its weight is packed away, and autograd knows nothing of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.nn.quantized.dynamic.Linear(64, 32)
    weight = torch.quantize_per_tensor(torch.randn(32, 64), 0.02, 0, torch.qint8)
    module.set_weight_bias(weight, torch.randn(32))
    return module


def test_torchs_dynamic_layer_learns_by_the_weight_that_it_gives_back() -> None:
    model = Holder(dynamic())
    W, bias = model.layer.weight().dequantize(), model.layer.bias()
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(**CONFIG, init_lora_weights=False))
    layer: Any = model.layer
    assert torch.equal(layer.base.weight(), W)
    x = torch.randn(3, 64, requires_grad=True)
    adapted(x).sum().backward()
    torch.testing.assert_close(
        x.grad, (W + layer.change("default").detach()).sum(0).expand(3, -1), rtol=1e-4, atol=1e-4
    )
    merged = adapted.merge_and_unload(into="dequantised").layer
    torch.testing.assert_close(merged.weight, W + layer.change("default"))
    assert torch.equal(merged.bias, bias)


def test_a_tensor_of_torchao_in_an_nn_linear() -> None:
    class Quantised(Tensor):
        """As torchao's: a weight that looks like the plain one and is something else."""

        __module__ = "torchao.dtypes.affine_quantized_tensor"
        packed: Tensor
        step: float

        @staticmethod
        def of(W: Tensor, step: float = 0.01) -> Quantised:
            made = Tensor._make_wrapper_subclass(Quantised, W.shape, dtype=W.dtype)
            made.packed, made.step = (W / step).round().to(torch.int8), step
            return made

        def dequantize(self) -> Tensor:
            return self.packed * self.step

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.detach.default:
                return Quantised.of(args[0].dequantize(), args[0].step)
            plain = [one.dequantize() if isinstance(one, Quantised) else one for one in args]
            return func(*plain, **(kwargs or {}))

    linear = nn.Linear(6, 5)
    W = linear.weight.detach().clone()
    linear.weight = nn.Parameter(Quantised.of(W), requires_grad=False)
    model = Holder(linear)
    x = torch.randn(3, 6, requires_grad=True)
    adapted = veneer.get_peft_model(model, veneer.LoraConfig(**CONFIG, init_lora_weights=False))
    layer: Any = model.layer
    assert layer.kind == "quantised"
    assert (layer.base.weight() - W).abs().max() <= 0.005
    total = layer.base.weight() + layer.change("default")
    y = adapted(x)
    torch.testing.assert_close(y, F.linear(x, total, linear.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, total.detach().sum(0).expand(3, -1))
    torch.testing.assert_close(adapted.merge_and_unload(into="dequantised").layer(x), y)
