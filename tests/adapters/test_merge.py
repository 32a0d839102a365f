"""Merging: the same outputs, exact undoing, several adapters, and embeddings that share a weight."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import LoraConfig, MergeError, PeftModel, UsageError, get_peft_model
from veneer.adapters import merge as merge_module

F64 = torch.float64


def out(model: Any, kind: str = "llama") -> Tensor:
    with torch.no_grad():
        return models.output(model, models.batch(kind, dtype=F64))


def close(a: Tensor, b: Tensor) -> None:
    """Equal in float64 up to the order of summation."""
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def two() -> PeftModel:
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(models.make("llama", dtype=F64), config, "a")
    adapted.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    return adapted.eval()


def test_merged_model_has_equal_outputs_and_no_wrappers(kind: str) -> None:
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(models.make(kind, dtype=F64), config).eval()
    before = out(adapted, kind)
    adapted.merge_adapter()
    close(out(adapted, kind), before)
    adapted.unmerge_adapter()
    assert torch.equal(out(adapted, kind), before)
    merged = adapted.merge_and_unload()
    close(out(merged, kind), before)
    assert merged.state_dict().keys() == models.make(kind).state_dict().keys()


def test_several_active_adapters_are_merged_together() -> None:
    adapted = two()
    adapted.set_adapter(["a", "b"])
    before = out(adapted)
    adapted.merge_adapter()
    close(out(adapted), before)
    assert adapted.get_base_model().model.layers[0].self_attn.q_proj.merged_adapters == ["a", "b"]
    adapted.unmerge_adapter()
    assert torch.equal(out(adapted), before)
    close(out(adapted.merge_and_unload()), before)


@pytest.mark.parametrize("first", ["a", "b"])
def test_merging_one_of_two_active_adapters_keeps_the_other(first: str) -> None:
    adapted = two()
    adapted.set_adapter(["a", "b"])
    before = out(adapted)
    adapted.merge_adapter([first])
    close(out(adapted), before)
    adapted.merge_adapter(["b" if first == "a" else "a"])
    close(out(adapted), before)
    adapted.unmerge_adapter()
    assert torch.equal(out(adapted), before)


def test_merging_an_inactive_adapter_adds_it() -> None:
    adapted = two()
    adapted.set_adapter(["a", "b"])
    both = out(adapted)
    adapted.set_adapter("a")
    adapted.merge_adapter(["b"])
    close(out(adapted), both)
    # and merging for good keeps what is merged and what is active
    close(out(adapted.merge_and_unload()), both)


def test_merging_a_named_adapter_for_good() -> None:
    adapted = two()
    adapted.set_adapter("b")
    alone = out(adapted)
    adapted.set_adapter("a")
    close(out(adapted.merge_and_unload(adapter_names=["b"])), alone)


def test_gradients_reach_an_adapter_beside_a_merged_one() -> None:
    adapted = two()
    adapted.set_adapter(["a", "b"])
    adapted.merge_adapter(["a"])
    models.output(adapted, models.batch("llama")).square().sum().backward()
    grads = {name: p.grad is not None for name, p in adapted.named_parameters() if ".lora_" in name}
    assert all(has == (".b." in name) for name, has in grads.items())


@pytest.mark.parametrize(("names", "message"), [(["c"], "no adapter 'c'"), (["a"], "Already merged: a")])
def test_names_that_cannot_be_merged(names: list[str], message: str) -> None:
    adapted = two()
    adapted.merge_adapter(["a"])
    before = snapshot(adapted)
    with pytest.raises(UsageError, match=message):
        adapted.merge_adapter(names)
    assert_same(before, snapshot(adapted))


def test_merging_leaves_no_trace_in_training_mode() -> None:
    """Neither mode merges nor unmerges; a merged adapter drops nothing and does not learn; for good, all is plain."""
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    adapted = get_peft_model(models.make("llama", dtype=F64), config).eval()
    before = out(adapted)
    adapted.merge_adapter()
    weights = {path: layer.base.weight() for path, layer in adapted.base_model.layers.items()}
    merged = out(adapted)
    close(merged, before)
    for mode in (True, False, True):
        adapted.train(mode)
        assert all(layer.base.weight() is weights[path] for path, layer in adapted.base_model.layers.items())
        assert torch.equal(out(adapted), merged)
    adapted.unmerge_adapter()
    assert not torch.equal(out(adapted), out(adapted))
    plain = adapted.merge_and_unload()
    assert plain.training
    assert torch.equal(out(plain), merged)


def test_unmerging_what_is_not_merged_does_nothing() -> None:
    adapted = two()
    before = snapshot(adapted)
    adapted.unmerge_adapter()
    assert_same(before, snapshot(adapted))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_values_that_are_not_finite(method: str) -> None:
    adapted = two()
    adapted.set_adapter(["b"])
    adapted.merge_adapter(["a"])
    with torch.no_grad():
        adapted.get_base_model().model.layers[1].mlp.up_proj.lora_A["b"].weight[0, 0] = float("inf")
    before = snapshot(adapted)
    with pytest.raises(MergeError, match="not finite"):
        getattr(adapted, method)(safe_merge=True)
    after = snapshot(adapted)
    assert all(torch.equal(after["values"][name], value) for name, value in before["values"].items())
    assert after["modules"] == before["modules"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_failure_in_the_middle_gives_everything_back(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = two()
    adapted.merge_adapter(["a"])
    before, weights = out(adapted), snapshot(adapted)["values"]
    real, calls = merge_module._merge_layer, 0

    def failing(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise MemoryError
        real(*args)

    monkeypatch.setattr(merge_module, "_merge_layer", failing)
    with pytest.raises(MemoryError):
        adapted.merge_adapter(["b"])
    monkeypatch.undo()
    after = snapshot(adapted)["values"]
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert torch.equal(out(adapted), before)
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        assert torch.equal(out(adapted), out(models.make("llama", dtype=F64)))


def test_a_model_cast_while_merged_unmerges_in_its_new_dtype() -> None:
    adapted = two()
    adapted.merge_adapter()
    adapted.to(torch.bfloat16)
    adapted.unmerge_adapter()
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    assert models.output(adapted, models.batch("llama")).dtype == torch.bfloat16


def test_merging_keeps_one_weight_more_and_merging_for_good_none() -> None:
    adapted = two()
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    original = layer.base_layer.weight
    adapted.merge_adapter()
    assert layer.unmerged["weight"] is original
    assert layer.base_layer.weight is not original
    adapted.merge_and_unload()
    assert layer.unmerged is None


def test_lora_bias_goes_into_the_bias() -> None:
    config = LoraConfig(target_modules=["q_proj", "fc1"], lora_bias=True, init_lora_weights=False)
    adapted = get_peft_model(models.make("opt", dtype=F64), config).eval()
    before = out(adapted, "opt")
    adapted.merge_adapter()
    close(out(adapted, "opt"), before)
    adapted.unmerge_adapter()
    assert torch.equal(out(adapted, "opt"), before)
    close(out(adapted.merge_and_unload(), "opt"), before)


# Embeddings that share their weight with the output head


SHARED = pytest.mark.filterwarnings("ignore:The adapter on .* does not reach:UserWarning")


def tied(target: str) -> PeftModel:
    config = LoraConfig(target_modules=[target, "q_proj"], init_lora_weights=False)
    return get_peft_model(models.make("llama-tied", dtype=F64), config).eval()


def test_an_adapter_on_one_of_two_tied_modules_says_so() -> None:
    with pytest.warns(UserWarning, match=r"'model.embed_tokens' does not reach lm_head"):
        tied("embed_tokens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(models.make("llama-tied"), LoraConfig(target_modules=["embed_tokens", "lm_head"]))


@SHARED
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_leaves_the_tied_other_alone(target: str) -> None:
    adapted = tied(target)
    before = out(adapted)
    model = adapted.get_base_model()
    inner, other = model.get_input_embeddings(), model.get_output_embeddings()
    if target == "lm_head":
        inner, other = other, inner
    shared = other.weight
    value = shared.detach().clone()
    adapted.merge_adapter()
    close(out(adapted), before)
    assert other.weight is shared
    assert torch.equal(shared, value)
    adapted.unmerge_adapter()
    assert inner.base_layer.weight is shared
    assert torch.equal(out(adapted), before)


@SHARED
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_merged_tied_model_is_saved_and_reloaded_by_plain_transformers(target: str, tmp_path: Path) -> None:
    adapted = tied(target)
    before = out(adapted)
    merged = adapted.merge_and_unload()
    close(out(merged), before)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path, dtype=F64).eval()
    assert torch.equal(out(again), out(merged))


def test_a_tied_model_whose_ties_are_not_touched_stays_tied() -> None:
    adapted = get_peft_model(models.make("llama-tied"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    merged = adapted.merge_and_unload()
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_an_embedding_saved_whole_unties_at_the_merge(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False)
    adapted = get_peft_model(models.make("llama-tied", dtype=F64), config).eval()
    models.randomise(adapted)
    before = out(adapted)
    merged = adapted.merge_and_unload()
    close(out(merged), before)
    merged.save_pretrained(tmp_path)
    assert torch.equal(out(type(merged).from_pretrained(tmp_path, dtype=F64).eval()), out(merged))


@SHARED
def test_an_encoder_decoder_that_would_untie_is_refused() -> None:
    config = LoraConfig(target_modules=["lm_head", "q"], init_lora_weights=False)
    adapted = get_peft_model(models.make("t5", dtype=F64), config).eval()
    if adapted.get_base_model().lm_head.base_layer.weight is not adapted.get_base_model().shared.weight:
        pytest.skip("this release of transformers does not tie T5's head")
    before = snapshot(adapted)
    with pytest.raises(MergeError, match="shares its weight"):
        adapted.merge_and_unload()
    assert_same(before, snapshot(adapted))
    unmerged = out(adapted, "t5")
    adapted.merge_adapter()
    close(out(adapted, "t5"), unmerged)
