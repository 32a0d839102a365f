"""Adapters whose factors are not one pair for each called layer are refused where factors are rearranged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from tests import models
from veneer.adapters import files
from veneer.adapters.convert import convert
from veneer.adapters.resize import resize
from veneer.core.errors import UsageError


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,eoi->no", x, self.stack)


MADE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "experts": (lambda: nn.Sequential(Experts()), {"target_modules": [], "target_parameters": ["0.stack"]}),
    "attention": (lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), {"target_modules": ["0"]}),
    "tied": (lambda: models.make("llama-tied"), {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
}


def adapt(kind: str) -> Any:
    make, fields = MADE[kind]
    adapted = veneer.get_peft_model(make(), veneer.LoraConfig(r=2, **fields))
    adapted.add_adapter("second", veneer.LoraConfig(r=2, **fields))
    return adapted


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_combining_is_refused(kind: str, how: str) -> None:
    adapted = adapt(kind)
    with pytest.raises(UsageError, match="merge the adapter into the model instead"):
        adapted.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type=how)
    assert list(adapted.peft_config) == ["default", "second"]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_one_adapter_with_weight_one_is_that_adapter(kind: str, how: str, tmp_path: Path) -> None:
    adapted = adapt(kind)
    models.randomise(adapted)
    adapted.add_weighted_adapter(["second"], [1.0], "third", combination_type=how)
    adapted.save_pretrained(tmp_path)
    third, second = (files.read(tmp_path / name) for name in ("third", "second"))
    assert third.config == second.config
    assert third.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in third.tensors.items())


@pytest.mark.parametrize("kind", MADE)
def test_converting_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match="converting knows one pair"):
        convert(adapt(kind).base_model, "default")


@pytest.mark.parametrize("kind", ["experts", "tied"])
def test_resizing_is_refused(kind: str, tmp_path: Path) -> None:
    adapt(kind).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="resizing knows one pair"):
        resize(files.read(tmp_path), 1)
