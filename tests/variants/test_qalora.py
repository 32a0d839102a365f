"""QALoRA: PEFT's own forward, on every linear base; merged as the dense change that it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.adapters.snapshot import assert_same, snapshot
from tests.models import batch, make, output
from veneer import AdapterFileError, ConfigError, LoraConfig, MergeError, PeftModel, get_peft_model

I, O, R = 12, 5, 3  # noqa: E741 - the shape legend


class Model(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(I, O, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def adapted(size: int, bias: bool = True, **more: Any) -> Any:
    torch.manual_seed(0)
    model = Model(bias).double()
    options = {"r": R, "lora_alpha": 7, "target_modules": ["layer"], "use_qalora": True, "qalora_group_size": size}
    found = get_peft_model(model, LoraConfig(**options, **more))
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return found


def in_peft(layer: Any, x: Tensor, size: int, training: bool = False, p: float = 0.0) -> Tensor:
    """PEFT's forward, which its own layers use for GPTQ weights only."""
    stand_in = SimpleNamespace(
        lora_A={"default": layer.lora_A["default"]},
        lora_B={"default": layer.lora_B["default"]},
        lora_dropout={"default": nn.Dropout(p) if p else nn.Identity()},
        scaling={"default": layer.scaling["default"]},
        qalora_group_size={"default": size},
        training=training,
        in_features=I,
    )
    return QALoraLinearVariant.forward(stand_in, "default", x, layer.base_layer(x))


@pytest.mark.parametrize("shape", [(4, I), (2, 3, I)], ids=str)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_outputs_and_gradients_are_pefts(size: int, use_rslora: bool, shape: tuple[int, ...]) -> None:
    model = adapted(size, use_rslora=use_rslora)
    layer = model.base_model.model.layer
    assert layer.lora_A["default"].weight.shape == (R, I // size)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    found, expected = model(x), in_peft(layer, x, size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_is_of_the_inputs() -> None:
    model = adapted(4, lora_dropout=0.5).train()
    x = torch.randn(2, 3, I, dtype=torch.float64)
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    expected = in_peft(model.base_model.model.layer, x, 4, training=True, p=0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 12])
def test_the_merged_weight_is_constant_over_groups(size: int) -> None:
    """The point of it: the change of each row has one value for each group."""
    model = adapted(size)
    layer, x = model.base_model.model.layer, torch.randn(4, I, dtype=torch.float64)
    before, expected = layer.base_layer.weight.detach().clone(), in_peft(layer, x, size)
    change = layer.change("default").view(O, I // size, size)
    torch.testing.assert_close(change, change[..., :1].expand_as(change), rtol=1e-12, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-12, atol=1e-12)


def test_lora_bias_is_added_and_merged() -> None:
    """PEFT leaves it out of the forward pass."""
    model = adapted(3, lora_bias=True)
    layer, x = model.base_model.model.layer, torch.randn(4, I, dtype=torch.float64)
    expected = in_peft(layer, x, 3) + layer.lora_B["default"].bias * layer.scaling["default"]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(MergeError, match="no bias"):
        adapted(3, bias=False, lora_bias=True).merge_and_unload()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_on_models_through_files(kind: str, tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": "all-linear", "use_qalora": True, "qalora_group_size": 8}
    model = get_peft_model(make(kind), LoraConfig(**options)).eval()
    base = output(make(kind), batch(kind))
    torch.testing.assert_close(output(model, batch(kind)), base, rtol=0, atol=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    found = output(model, batch(kind))
    model.save_pretrained(tmp_path)
    shapes = {t.shape[1] for key, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in key}
    assert shapes <= {2, 3, 6, 8}
    again = PeftModel.from_pretrained(make(kind), tmp_path)
    assert again.peft_config["default"].qalora_group_size == 8
    assert torch.equal(output(again, batch(kind)), found)
    torch.testing.assert_close(output(model.merge_and_unload(), batch(kind)), found, rtol=1e-4, atol=1e-4)


def test_plain_factors_under_the_name_of_qalora_are_refused(tmp_path: Path) -> None:
    """What PEFT writes for layers that it ignores use_qalora on."""
    options = {"r": 2, "target_modules": ["q_proj"]}
    get_peft_model(make("llama"), LoraConfig(**options)).save_pretrained(tmp_path)
    config = LoraConfig(**options, use_qalora=True)
    with pytest.raises(AdapterFileError, match=r"shape \(2, 16\), expected \(2, 1\)"):
        PeftModel.from_pretrained(make("llama"), tmp_path, config=config)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"target_modules": ["embed_tokens"]}, "no linear layer"),
    ("llama", {"qalora_group_size": 5}, "has 16 inputs, which cannot be put into groups"),
    ("llama", {"init_lora_weights": "pissa"}, "starts from single inputs"),
    ("llama", {"use_dora": True}, "cannot be combined"),
    ("llama", {"alora_invocation_tokens": [1]}, "cannot be combined"),
]


@pytest.mark.parametrize(("kind", "more", "message"), REFUSED)
def test_what_has_no_meaning_is_refused_before_anything_changes(kind: str, more: dict[str, Any], message: str) -> None:
    model = make(kind)
    before = snapshot(model)
    options = {"target_modules": ["q_proj"], "use_qalora": True, "qalora_group_size": 4, **more}
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, LoraConfig(**options))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"qalora_group_size": 8}, "no effect without use_qalora"),
        ({"use_qalora": True, "qalora_group_size": 0}, "at least 1"),
        ({"use_qalora": True, "qalora_group_size": 2.5}, "whole number"),
        ({"use_qalora": 1}, "true or false"),
    ],
)
def test_values_that_mean_nothing_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**more)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_starts(init: bool | str) -> None:
    model = Model()
    config = LoraConfig(r=R, target_modules=["layer"], use_qalora=True, qalora_group_size=4, init_lora_weights=init)
    x = torch.randn(4, I)
    before = model(x)
    after = get_peft_model(model, config)(x)
    assert torch.equal(after, before) == (init is not False)
