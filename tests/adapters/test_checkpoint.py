"""Parameters read from a model's files, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from veneer import UsageError
from veneer.adapters.checkpoint import Checkpoint, fill, lent
from veneer.adapters.index import ModuleIndex
from veneer.tasks.shards import shards, skeleton, weight_files


def opened(kind: str, folder: Path) -> tuple[Any, Any, Checkpoint]:
    model = models.make(kind)
    model.save_pretrained(folder, max_shard_size="5KB")
    empty = skeleton(folder, auto_class=type(model).__name__)
    return model, empty, Checkpoint(empty, shards(empty, weight_files(folder)))


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "bert"])
def test_every_parameter(kind: str, tmp_path: Path) -> None:
    model, _, checkpoint = opened(kind, tmp_path)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(parameter.shape)
        assert torch.equal(checkpoint.read(name), parameter)
    assert len(checkpoint.names()) <= len(list(model.named_parameters()))


def test_what_is_not_there(tmp_path: Path) -> None:
    _, empty, checkpoint = opened("llama", tmp_path)
    assert "model.no" not in checkpoint
    with pytest.raises(UsageError, match=r"hold no 'model\.no'"):
        checkpoint.read("model.no")
    fresh = Checkpoint(empty, shards(empty, weight_files(tmp_path)))
    for path in weight_files(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match="not a complete safetensors file"):
        fresh.read("lm_head.weight")


def test_values_are_lent_and_taken_back() -> None:
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    with lent(layer, "weight", torch.ones(2, 3)):
        assert torch.equal(layer.weight, torch.ones(2, 3))
    assert layer.weight.is_meta
    with pytest.raises(ZeroDivisionError), lent(layer, "weight", torch.ones(2, 3)):
        raise ZeroDivisionError
    assert layer.weight.is_meta


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_model_is_filled_and_stays_tied(kind: str, tmp_path: Path) -> None:
    model, empty, checkpoint = opened(kind, tmp_path)
    fill(empty, checkpoint)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(empty.get_parameter(name), parameter)
    assert ModuleIndex(empty).tied == ModuleIndex(model).tied
