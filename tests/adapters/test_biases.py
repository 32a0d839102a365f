"""Biases of the base that an adapter trains: they switch with it and come back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import LoraConfig, PeftModel, UsageError, get_peft_model


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return models.output(model, models.batch("opt"))


def biases(model: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p.detach().clone()
        for name, p in model.named_parameters()
        if name.endswith(".bias") and ".lora_" not in name
    }


def train(model: PeftModel, seed: int) -> None:
    """Move everything that learns."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


ORIGINAL = biases(models.make("opt"))


def learning(model: PeftModel) -> set[str]:
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model.")
        for name, p in model.named_parameters()
        if p.requires_grad and ".lora_" not in name
    }


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_which_biases_learn(bias: Any) -> None:
    adapted = get_peft_model(models.make("opt"), LoraConfig(target_modules=["q_proj"], bias=bias))
    of_targets = {name for name in ORIGINAL if ".q_proj." in name}
    assert learning(adapted) == {"none": set(), "lora_only": of_targets, "all": set(ORIGINAL)}[bias]
    models.output(adapted, models.batch("opt")).square().sum().backward()
    moved = {n for n, p in adapted.named_parameters() if p.grad is not None and ".lora_" not in n}
    # A key's bias moves all scores of a row alike: its gradient is zero, but it is there.
    assert len(moved) == len(learning(adapted))


@pytest.fixture
def three() -> PeftModel:
    adapted = get_peft_model(models.make("opt"), LoraConfig(target_modules=["q_proj"], bias="all"), "all")
    train(adapted, 1)
    adapted.add_adapter("some", LoraConfig(target_modules=["v_proj", "q_proj"], bias="lora_only"))
    adapted.set_adapter("some")
    train(adapted, 2)
    adapted.add_adapter("none", LoraConfig(target_modules=["q_proj"]))
    return adapted.eval()


def test_values_switch_with_the_adapter(three: PeftModel) -> None:
    some = biases(three)
    assert {key for key in some if not torch.equal(some[key], ORIGINAL[key])} == {
        key for key in ORIGINAL if ".q_proj." in key or ".v_proj." in key
    }
    three.set_adapter("all")
    everything = biases(three)
    assert not any(torch.equal(everything[key], ORIGINAL[key]) for key in ORIGINAL)
    for name, right in [("none", ORIGINAL), ("some", some), ("all", everything), ("none", ORIGINAL)]:
        three.set_adapter(name)
        assert equal(biases(three), right)


def test_parameters_stay_the_same_objects(three: PeftModel) -> None:
    """An optimiser that holds them goes on working."""
    before = {name: id(p) for name, p in three.named_parameters()}
    for name in ("all", "none", "some"):
        three.set_adapter(name)
    assert {name: id(p) for name, p in three.named_parameters()} == before


def test_disabling_shows_the_originals(three: PeftModel) -> None:
    before, values = out(three), biases(three)
    with three.disable_adapter():
        assert equal(biases(three), ORIGINAL)
        assert torch.equal(out(three), out(models.make("opt")))
    assert equal(biases(three), values)
    assert torch.equal(out(three), before)


def test_only_one_can_be_active(three: PeftModel) -> None:
    before = snapshot(three)
    with pytest.raises(UsageError, match="each train the base's biases"):
        three.set_adapter(["all", "some"])
    assert_same(before, snapshot(three))
    three.set_adapter(["none", "all"])
    assert three.base_model.biases.shown == "all"


def test_deleting_gives_the_originals_back(three: PeftModel) -> None:
    three.set_adapter("none")
    three.delete_adapter("some")
    three.delete_adapter("all")
    assert equal(biases(three), ORIGINAL)
    assert learning(three) == set()


def test_unloading_gives_the_originals_back(three: PeftModel) -> None:
    base = three.unload()
    assert equal(biases(base), ORIGINAL)
    assert torch.equal(out(base), out(models.make("opt")))


@pytest.mark.parametrize("name", ["all", "some", "none"])
def test_merging_for_good_leaves_the_trained_ones(name: str, three: PeftModel) -> None:
    three.set_adapter(name)
    before, values = out(three), biases(three)
    merged = three.merge_and_unload()
    assert equal(biases(merged), values)
    torch.testing.assert_close(out(merged), before)


def test_every_adapter_is_saved_with_its_own(three: PeftModel, tmp_path: Path) -> None:
    outputs = {}
    for name in ("all", "some", "none"):
        three.set_adapter(name)
        outputs[name] = out(three)
    three.save_pretrained(tmp_path)
    for name, right in outputs.items():
        assert torch.equal(out(PeftModel.from_pretrained(models.make("opt"), tmp_path / name)), right)
    together = PeftModel.from_pretrained(models.make("opt"), tmp_path / "all", "all")
    together.load_adapter(tmp_path / "some", "some")
    together.set_adapter("some")
    assert torch.equal(out(together), outputs["some"])


def test_a_trained_bias_and_a_lora_bias_on_the_same_layer(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], bias="all", lora_bias=True, init_lora_weights=False)
    adapted = get_peft_model(models.make("opt"), config, "first")
    train(adapted, 1)
    adapted.add_adapter("other", config)
    adapted.eval()
    before, values = out(adapted), biases(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(out(adapted), before)
    # Saved while merged: what was trained, not the sum that merging made of it.
    adapted.save_pretrained(tmp_path, selected_adapters=["first"])
    assert torch.equal(out(PeftModel.from_pretrained(models.make("opt"), tmp_path / "first")), before)
    adapted.add_adapter("late", config)
    adapted.unmerge_adapter()
    assert equal(biases(adapted), values)
    for name in ("late", "other"):
        adapted.set_adapter(name)
        assert equal(biases(adapted), ORIGINAL)
    torch.testing.assert_close(out(adapted.merge_and_unload(adapter_names=["first"])), before)
