"""The same start by PEFT and by veneer, on equal models."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import Tensor, nn

import veneer
from tests import models

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def pair(kind: str, init: Any, **more: Any) -> tuple[Any, veneer.PeftModel]:
    """PEFT's model and veneer's, fresh, in evaluation mode."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], "init_lora_weights": init, **more}
    with warnings.catch_warnings():
        # PEFT says what it changes and what it would convert.
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(models.make(kind), peft.LoraConfig(**fields, fan_in_fan_out=kind == "gpt2"))
    return theirs.eval(), veneer.get_peft_model(models.make(kind), veneer.LoraConfig(**fields)).eval()


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by name."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def compare(theirs: nn.Module, ours: nn.Module, tolerance: float, only: str = "") -> None:
    """The factors, of layers with this in their name, are PEFT's but for signs, and learn where PEFT's do."""
    expected, found = factors(theirs), factors(ours)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if only not in name:
            continue
        assert found[name].requires_grad == value.requires_grad, name
        assert found[name].shape == value.shape, name
        error = float((found[name].detach().abs() - value.detach().abs()).abs().max())
        assert error <= tolerance * max(1.0, float(value.detach().abs().max())), (name, error)


def gradients(theirs: nn.Module, ours: nn.Module, x: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The gradients of a fixed function of the outputs, by name: veneer's and PEFT's."""
    for model in (theirs, ours):
        y = models.output(model, x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    expected, found = factors(theirs), factors(ours)
    return {name: (found[name].grad, p.grad) for name, p in expected.items() if p.requires_grad}
