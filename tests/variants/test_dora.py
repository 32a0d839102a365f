"""DoRA where it is not LoRA: its start, its magnitude, dropout, rows of zeros, and PEFT's convolutions.

Linear, transposed and embedding layers are held against PEFT in tests/adapters/test_against_peft.py.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import veneer
from veneer.variants.dora import MAGNITUDE

F64 = torch.float64


class Net(nn.Module):
    """A convolution of each dimension, each on its own input, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(3, 4, (3, 2), bias=False)
        self.three = nn.Conv3d(2, 4, 2, padding=1)
        self.flat = nn.Linear(6, 5)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.cat([getattr(self, name)(x).flatten() for name, x in inputs.items()])


def net(dtype: torch.dtype = F64) -> Net:
    torch.manual_seed(4)
    return Net().to(dtype)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(5)
    shapes = {"one": (2, 3, 7), "two": (2, 3, 5, 4), "three": (2, 2, 3, 3, 3), "flat": (2, 3, 6)}
    return {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}


def move(model: nn.Module) -> None:
    torch.manual_seed(6)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn_like(parameter))


FIELDS = {"r": 2, "lora_alpha": 3, "target_modules": ["one", "two", "three", "flat"], "use_dora": True}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equal_to_peft_on_convolutions_in_outputs_gradients_and_files(dropout: float, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**FIELDS, lora_dropout=dropout))
    move(theirs)
    theirs.save_pretrained(str(tmp_path / "a"))
    ours = veneer.PeftModel.from_pretrained(net(), tmp_path / "a", is_trainable=True)
    ours.save_pretrained(tmp_path / "b")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert a["base_model.model.two.lora_magnitude_vector"].shape == (1, 4, 1, 1)

    grads = []
    for model in (theirs.train(), ours.train()):
        # With dropout both draw from the same seed, one mask a layer.
        torch.manual_seed(0)
        y = model(inputs())
        (y * torch.linspace(-1, 1, y.numel(), dtype=F64)).sum().backward()
        grads.append((y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (their_y, their_grads), (our_y, our_grads) = grads
    torch.testing.assert_close(our_y, their_y, rtol=1e-9, atol=1e-9)
    assert our_grads.keys() == their_grads.keys()
    for name, gradient in their_grads.items():
        torch.testing.assert_close(our_grads[name], gradient, rtol=1e-9, atol=1e-9)

    back = peft.PeftModel.from_pretrained(net(), str(tmp_path / "b"))
    torch.testing.assert_close(back.eval()(inputs()), ours.eval()(inputs()), rtol=1e-9, atol=1e-9)
    merged, expected = ours.merge_and_unload().state_dict(), theirs.eval().merge_and_unload().state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-12, atol=1e-12)


def test_the_magnitude_starts_as_the_norm_of_each_row() -> None:
    model = veneer.get_peft_model(net(), veneer.LoraConfig(**FIELDS))
    for name in FIELDS["target_modules"]:
        layer = getattr(model.get_base_model(), name)
        norms = layer.base_layer.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(layer.tensors("default")[MAGNITUDE].flatten(), norms, rtol=1e-12, atol=0)


def test_memory_name_is_pefts() -> None:
    ours, theirs = (m.get_peft_model(net(), m.LoraConfig(**FIELDS)) for m in (veneer, peft))
    names = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert names[0] == names[1]


def test_the_norm_is_a_constant_in_the_backward_pass() -> None:
    """Against plain torch: the gradient is that of m / stop(|W'|) * W'."""
    model = veneer.get_peft_model(net(), veneer.LoraConfig(**{**FIELDS, "target_modules": ["flat"]}))
    move(model)
    x = inputs()["flat"]
    model({"flat": x}).square().sum().backward()
    layer = model.get_base_model().flat
    p = {key: tensor.detach().clone().requires_grad_() for key, tensor in layer.tensors("default").items()}
    W = layer.base_layer.weight + 1.5 * p["lora_B.weight"] @ p["lora_A.weight"]
    W = (p[MAGNITUDE] / W.detach().norm(dim=1)).unsqueeze(1) * W
    (x @ W.t() + layer.base_layer.bias).square().sum().backward()
    for key, tensor in layer.tensors("default").items():
        torch.testing.assert_close(tensor.grad, p[key].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_row_of_zeros_stays_zero_and_finite(dropout: float) -> None:
    """Vocabularies are padded with such rows; PEFT divides zero by zero there."""
    base = net()
    with torch.no_grad():
        base.flat.weight[1] = 0
    before = base.flat(inputs()["flat"])
    model = veneer.get_peft_model(
        base, veneer.LoraConfig(**{**FIELDS, "target_modules": ["flat"]}, lora_dropout=dropout)
    ).train()
    y = model({"flat": inputs()["flat"]})
    assert torch.equal(y, before.flatten()) or dropout
    assert y.isfinite().all()
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_dropped_tokens_keep_the_embedding_of_the_base() -> None:
    table = nn.Sequential(nn.Embedding(9, 5)).to(F64)
    frozen = table[0].weight.detach().clone()
    config = veneer.LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5)
    model = veneer.get_peft_model(table, config).train()
    move(model)
    ids = torch.arange(9).repeat(40)
    out = model(ids)
    full = model.eval()(ids)
    plain = frozen[ids]
    dropped = (out == plain).all(1)
    assert 0.3 < dropped.double().mean() < 0.7
    torch.testing.assert_close(out[~dropped], (plain + 2 * (full - plain))[~dropped], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_start_in_half_precision_is_the_base_too(dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    x = torch.randn(3, 6).to(dtype)
    before = base(x)
    config = veneer.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    assert torch.equal(veneer.get_peft_model(base, config, autocast_adapter_dtype=False)(x), before)


def test_lora_bias_is_refused_as_in_peft() -> None:
    with pytest.raises(veneer.ConfigError, match="lora_bias=True has no meaning with use_dora=True"):
        veneer.LoraConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="DoRA"):
        peft.LoraConfig(use_dora=True, lora_bias=True)


def test_several_matrices_in_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.bases.linear import Base

    monkeypatch.setattr(Base, "one_matrix", False)
    model = net()
    with pytest.raises(veneer.ConfigError, match="use_dora=True has no meaning on Linear"):
        veneer.get_peft_model(model, veneer.LoraConfig(**FIELDS))
    assert type(model.flat) is nn.Linear
