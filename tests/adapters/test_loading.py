"""Loading one adapter more: names that are taken, and a cost that does not grow with the adapters there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import LoraConfig, PeftModel, UsageError, get_peft_model


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
