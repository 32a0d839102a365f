"""Convolutions as a base: every way to pad, groups, files and numbers of PEFT, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import veneer
from veneer.bases.conv import Base
from veneer.core.errors import ConfigError, MergeError, TargetError

CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "2d": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
    "2d-1x1": (nn.Conv2d, {"kernel_size": 1, "bias": False}),
    "3d": (nn.Conv3d, {"kernel_size": 2, "padding": 1}),
    "1d-groups": (nn.Conv1d, {"kernel_size": 3, "groups": 2}),
    "2d-groups": (nn.Conv2d, {"kernel_size": 3, "groups": 4}),
    "3d-groups": (nn.Conv3d, {"kernel_size": 2, "groups": 2, "bias": False}),
}
R = 4
kinds = pytest.mark.parametrize("kind", CONVOLUTIONS)


class Strange(nn.Conv2d):
    """A convolution that does not compute with its own weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def layer(kind: str, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    made, options = CONVOLUTIONS[kind]
    return nn.Sequential(made(4, 8, **options))


def inputs(kind: str) -> Tensor:
    torch.manual_seed(9)
    return torch.randn(2, 4, *(5, 6, 4)[: int(kind[0])])


def adapt(model: nn.Module, **fields: Any) -> Any:
    given = {"r": R, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False} | fields
    return veneer.get_peft_model(model, veneer.LoraConfig(**given))


def theirs(model: nn.Module, **fields: Any) -> Any:
    given = {"r": R, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**given))


@kinds
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("lora_bias", [False, True], ids=["plain", "lora-bias"])
def test_outputs_gradients_and_files_are_pefts(kind: str, rslora: bool, lora_bias: bool, tmp_path: Path) -> None:
    fields = {"use_rslora": rslora, "lora_bias": lora_bias and CONVOLUTIONS[kind][1].get("bias", True)}
    x = inputs(kind)
    original = theirs(layer(kind), **fields)
    with warnings.catch_warnings():
        # PEFT takes the bias of lora_bias, which has one dimension, for a broken factor.
        warnings.simplefilter("ignore")
        original.save_pretrained(tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(layer(kind), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(ours(x), original(x))
    for model in (ours, original):
        model(x).square().sum().backward()
    gradients = {name: p.grad for name, p in original.named_parameters() if p.requires_grad}
    assert gradients
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients.pop(name))
    assert not gradients

    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(layer(kind), tmp_path / "ours")
    torch.testing.assert_close(back(x), ours(x))
    if "groups" in kind:
        with pytest.raises(MergeError, match="groups"):
            ours.merge_and_unload()
    else:
        torch.testing.assert_close(ours.merge_and_unload()(x), original.merge_and_unload()(x), atol=1e-5, rtol=1e-5)


@kinds
def test_the_factors_can_be_called_as_in_peft(kind: str) -> None:
    model, x = adapt(layer(kind)), inputs(kind)
    wrapper = model.base_model.model[0]
    A, B = wrapper.lora_A["default"], wrapper.lora_B["default"]
    assert type(A) is type(B) is CONVOLUTIONS[kind][0]
    update = B(A(x)) * wrapper.scaling["default"]
    torch.testing.assert_close(model(x), wrapper.base_layer(x) + update)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, (1, 2), "same", "valid"], ids=str)
@pytest.mark.parametrize("dilation", [1, (1, 2)], ids=str)
def test_every_padding(mode: str, padding: Any, dilation: Any) -> None:
    """Against one convolution with ``W + s B A``, padded by torch."""
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 5, 3, padding=padding, dilation=dilation, padding_mode=mode).double()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    model = adapt(nn.Sequential(conv))
    wrapper = model.base_model.model[0]
    A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    W = conv.weight + torch.einsum("or,rikl->oikl", B.flatten(1), A) * wrapper.scaling["default"]
    plain = nn.Conv2d(3, 5, 3, padding=padding, dilation=dilation, padding_mode=mode).double()
    with torch.no_grad():
        plain.weight.copy_(W)
        plain.bias.copy_(conv.bias)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_an_update_with_groups_reaches_every_input() -> None:
    """Against one convolution without groups."""
    torch.manual_seed(3)
    conv = nn.Conv1d(4, 6, 3, groups=2, padding=1, stride=2).double()
    x = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    model = adapt(nn.Sequential(conv), r=2)
    wrapper = model.base_model.model[0]
    A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    dense = torch.zeros(6, 4, 3, dtype=torch.float64)
    for group in range(2):
        rows, columns = slice(3 * group, 3 * group + 3), slice(2 * group, 2 * group + 2)
        dense[rows, columns] = conv.weight[rows].detach()
        dense[rows] += torch.einsum("or,rik->oik", B[rows, :, 0], A[group : group + 1]).detach() * 3.0
    expected = F.conv1d(x, dense, conv.bias, stride=2, padding=1)
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (ours,), (theirs_,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(ours, theirs_, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_with_groups_is_refused_and_changes_nothing(merge: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 1, groups=2))
    adapted = adapt(model, target_modules=["0", "1"], r=2)
    x = torch.randn(2, 4, 6)
    before = adapted(x)
    with pytest.raises(MergeError, match="2 groups"):
        getattr(adapted, merge)()
    assert torch.equal(adapted(x), before)
    assert torch.equal(adapted.unload()(x), model(x))


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        adapt(layer("2d-groups"), r=6)
    assert adapt(layer("2d-groups"), r=6, rank_pattern={"0": 8}).base_model.model[0].r == {"default": 8}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one"])
def test_dropout_drops_inputs_of_the_update(batched: bool) -> None:
    model = adapt(layer("2d-1x1"), lora_dropout=0.5)
    x = torch.ones(2, 4, 3, 3) if batched else torch.ones(4, 3, 3)
    wrapper = model.base_model.model[0]
    torch.manual_seed(2)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(2)
    update = wrapper.lora_B["default"](wrapper.lora_A["default"](dropped)) * 1.5
    torch.testing.assert_close(model.train()(x), wrapper.base_layer(x) + update)


def test_what_is_accepted() -> None:
    for kind in CONVOLUTIONS:
        assert Base.accepts(layer(kind)[0])
    assert not Base.accepts(nn.ConvTranspose2d(2, 2, 2))
    assert not Base.accepts(Strange(2, 2, 2))
    assert not Base.accepts(nn.LazyConv2d(2, 2))
    assert not Base.accepts(parametrizations.weight_norm(nn.Conv2d(2, 2, 2)))
    with pytest.raises(TargetError, match="ConvTranspose1d, which cannot be adapted"):
        adapt(nn.Sequential(nn.ConvTranspose1d(2, 2, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype) -> None:
    model = adapt(layer("2d").to(dtype), lora_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(inputs("2d").to(dtype))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


def test_a_residual_network_is_adapted_as_by_peft(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_channels": 1, "num_labels": 3}
    config = transformers.ResNetConfig(**sizes)

    def model() -> Any:
        torch.manual_seed(4)
        return transformers.ResNetForImageClassification(config).eval()

    x = torch.randn(2, 1, 16, 16)
    original = theirs(model(), target_modules=["convolution"], modules_to_save=["classifier"])
    original.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(model(), tmp_path)
    assert len(ours.match_report.targets) == 8
    torch.testing.assert_close(ours(x).logits, original(x).logits)
    torch.testing.assert_close(ours.merge_and_unload()(x).logits, original(x).logits, rtol=1e-4, atol=1e-5)
