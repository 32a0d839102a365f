"""Loading one adapter more: names that are taken, and a cost that does not grow with the adapters there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import BaseMismatchWarning, LoraConfig, PeftModel, UsageError, get_peft_model
from veneer.adapters import fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of a tiny model on disk."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(models.make("llama"), config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_name_that_is_taken_is_refused(is_trainable: bool, folder: Path) -> None:
    adapted = PeftModel.from_pretrained(models.make("llama"), folder, is_trainable=True)
    before = snapshot(adapted)
    with pytest.raises(UsageError, match=r"already an adapter 'default'.*hotswap_adapter"):
        adapted.load_adapter(folder, "default", is_trainable)
    assert_same(before, snapshot(adapted))


@pytest.mark.parametrize("inner", [False, True])
def test_a_checkpoint_of_the_trainer_goes_into_its_own_adapter(inner: bool, folder: Path) -> None:
    """A model of several adapters has each in a folder of its own in the checkpoint."""
    adapted = PeftModel.from_pretrained(models.make("llama"), folder, is_trainable=True)
    parameters = dict(adapted.named_parameters())
    right = {name: p.detach().clone() for name, p in parameters.items()}
    models.randomise(adapted)
    ((folder.parent if inner else folder) / "trainer_state.json").write_text("{}")
    adapted.load_adapter(folder, "default")
    for name, parameter in adapted.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, right[name])


# Cost


def calls(run: Callable[[], object]) -> int:
    """How many functions a call enters, torch's own included."""
    count = 0

    def tick(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(tick)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_the_cost_of_loading_does_not_grow_with_the_adapters_there(folder: Path) -> None:
    adapted = PeftModel.from_pretrained(models.make("llama"), folder)
    costs = [calls(partial(adapted.load_adapter, folder, f"a{number}")) for number in range(40)]
    assert costs[39] < 1.05 * costs[1]


def test_the_cost_of_loading_grows_with_its_own_targets_alone(tmp_path: Path) -> None:
    """Of the layers that an adapter is not on, it only asks whether their weights are what they were."""
    costs = {}
    for depth in (4, 16):
        model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(depth)])
        adapted = get_peft_model(model, LoraConfig(target_modules=["0.0", "1.0"]))
        adapted.save_pretrained(tmp_path)
        adapted.load_adapter(tmp_path, "first")
        costs[depth] = calls(partial(adapted.load_adapter, tmp_path, "second"))
    parameters = 2 * (16 - 4)
    assert costs[16] - costs[4] < 20 * parameters < costs[4]


def test_the_base_is_looked_at_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    sample = fingerprint._sample
    monkeypatch.setattr(fingerprint, "_sample", lambda parameter: (looked.append(1), sample(parameter))[1])
    adapted = PeftModel.from_pretrained(models.make("llama"), folder)
    once = len(looked)
    adapted.load_adapter(folder, "b")
    adapted.merge_adapter()
    adapted.load_adapter(folder, "c")
    assert len(looked) == once
    adapted.unmerge_adapter()
    weight = adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.warns(BaseMismatchWarning):
        adapted.load_adapter(folder, "d")
    with torch.no_grad():
        weight.sub_(1.0)
    assert len(looked) == 2 * once


def test_the_base_under_inference_mode(folder: Path) -> None:
    """Tensors made there have no count of their changes."""
    with torch.inference_mode():
        adapted = PeftModel.from_pretrained(models.make("llama"), folder)
        adapted.load_adapter(folder, "b")
    assert list(adapted.peft_config) == ["default", "b"]
