"""Modules that are trained whole: their own copy for each adapter, the original for the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import LoraConfig, PeftModel, UsageError, get_peft_model

CONFIG = LoraConfig(target_modules=["query"], task_type="SEQ_CLS")


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return models.output(model, models.batch("bert"))


@pytest.fixture
def adapted() -> PeftModel:
    model = get_peft_model(models.make("bert"), CONFIG, "a")
    model.add_adapter("b", CONFIG)
    model.add_adapter("plain", LoraConfig(target_modules=["value"]))
    for seed, name in enumerate(("a", "b", "plain")):
        models.randomise(model, adapter=name, seed=seed)
    return model.eval()


def test_a_copy_starts_as_the_original() -> None:
    assert torch.equal(out(get_peft_model(models.make("bert"), CONFIG)), out(models.make("bert")))


def test_each_adapter_has_its_own_copy(adapted: PeftModel) -> None:
    head = adapted.get_base_model().classifier
    for name in ("a", "b", "plain", "a"):
        adapted.set_adapter(name)
        current = head.modules_to_save[name] if name != "plain" else head.original_module
        assert head.current is current
        assert torch.equal(head.weight, current.weight)
        learning = {n for n, p in head.named_parameters() if p.requires_grad}
        assert learning == ({f"modules_to_save.{name}.{p}" for p in ("weight", "bias")} if name != "plain" else set())
    assert not torch.equal(head.modules_to_save["a"].weight, head.modules_to_save["b"].weight)
    original = models.make("bert").classifier
    assert torch.equal(head.original_module.weight, original.weight)


def test_only_one_copy_can_be_active(adapted: PeftModel) -> None:
    before = snapshot(adapted)
    with pytest.raises(UsageError, match=r"a, b each have their own 'classifier'"):
        adapted.set_adapter(["a", "b"])
    assert_same(before, snapshot(adapted))
    adapted.set_adapter(["plain", "b"])
    assert adapted.get_base_model().classifier.active == "b"


def test_disabling_shows_the_original(adapted: PeftModel) -> None:
    before = out(adapted)
    with adapted.disable_adapter():
        assert torch.equal(out(adapted), out(models.make("bert")))
    assert torch.equal(out(adapted), before)


def test_deleting(adapted: PeftModel) -> None:
    adapted.set_adapter("b")
    expected = out(adapted)
    adapted.delete_adapter("a")
    assert torch.equal(out(adapted), expected)
    adapted.set_adapter("plain")
    adapted.delete_adapter("b")
    assert type(adapted.get_base_model().classifier) is torch.nn.Linear


def test_merging_for_good_leaves_the_active_copy(adapted: PeftModel) -> None:
    adapted.set_adapter("b")
    expected = out(adapted)
    copy = adapted.get_base_model().classifier.modules_to_save["b"]
    base = adapted.merge_and_unload()
    assert base.classifier is copy
    torch.testing.assert_close(out(base), expected)


def test_unloading_leaves_the_original(adapted: PeftModel) -> None:
    assert torch.equal(out(adapted.unload()), out(models.make("bert")))


def test_counts_leave_out_the_originals_that_are_not_in_use(adapted: PeftModel) -> None:
    single = get_peft_model(models.make("bert"), CONFIG)
    base = sum(p.numel() for p in models.make("bert").parameters())
    factors = sum(p.numel() for n, p in single.named_parameters() if ".lora_" in n)
    head = sum(p.numel() for p in models.make("bert").classifier.parameters())
    assert single.get_nb_trainable_parameters() == (factors + head, base + factors)


def test_embeddings_can_be_saved_whole(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False)
    adapted = get_peft_model(models.make("llama"), config).eval()
    models.randomise(adapted)
    adapted.save_pretrained(tmp_path)
    inputs = models.batch("llama")
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path)
    assert torch.equal(models.output(again, inputs), models.output(adapted, inputs))
    models.output(adapted, inputs).sum().backward()
    assert adapted.get_base_model().model.embed_tokens.modules_to_save["default"].weight.grad is not None


def test_a_wrapper_reads_like_the_module(adapted: PeftModel) -> None:
    head = adapted.get_base_model().classifier
    assert head.in_features == models.D
    assert head.bias is head.modules_to_save["a"].bias
    with pytest.raises(AttributeError, match="nothing"):
        _ = head.nothing
