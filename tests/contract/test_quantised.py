"""What every variant keeps on a base that stores W in a few bits: it is the plain layer of the weight it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.contract.test_contract import (
    Holder,
    adapt,
    base_model,
    config,
    dtypes,
    move,
    options,
    quantised_combinations,
)
from veneer.core import registry
from veneer.core.errors import MergeError, UsageError


def twin_of(base: str, model: Holder) -> Holder:
    """A model of one plain layer, with the weight that the quantised one is read as."""
    layer = model.layer
    W_OI = registry.load("bases", base).Base(layer).weight()
    plain = nn.Linear(W_OI.shape[1], W_OI.shape[0], layer.bias is not None)
    plain.load_state_dict({"weight": W_OI} | ({} if layer.bias is None else {"bias": layer.bias}))
    return Holder(plain, model.case)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Sums of fewer than 32 terms, each rounded a few times in float32."""
    assert (found - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


@quantised_combinations
def test_outputs_and_gradients_are_those_of_the_plain_layer(variant: str, base: str, case: str) -> None:
    for option in options(variant, base_model(base, case, torch.float32)[0].layer):
        model, x, _ = base_model(base, case, torch.float32)
        names = ("default", "second") if not option else ("default",)
        twin = adapt(twin_of(base, model), config(variant, **option), *names)
        ours = adapt(model, config(variant, **option), *names)
        found = []
        for adapted in (ours, twin):
            move(adapted)
            adapted.set_adapter(list(names))
            inputs = x.clone().requires_grad_()
            y = adapted(inputs)
            learning = [p for p in adapted.parameters() if p.requires_grad]
            weights = torch.linspace(-1, 1, y.numel()).view_as(y)
            found.append([y, *torch.autograd.grad((y * weights).sum(), [inputs, *learning])])
        assert len(found[0]) == len(found[1]) > 2
        for own, plain in zip(*found, strict=True):
            assert_near(own, plain)


@quantised_combinations
def test_merged_into_a_plain_layer_is_what_the_plain_layer_merges_into(variant: str, base: str, case: str) -> None:
    model, x, _ = base_model(base, case, torch.float32)
    twin, ours = adapt(twin_of(base, model), config(variant)), adapt(model, config(variant))
    move(twin)
    move(ours)
    unmerged = ours(x)
    merged, expected = ours.merge_and_unload(into="dequantised").layer, twin.merge_and_unload().layer
    assert type(merged) is nn.Linear
    assert torch.equal(merged.weight, expected.weight)
    assert_near(merged(x), unmerged)


@quantised_combinations
def test_merging_is_refused_without_saying_into_what(variant: str, base: str, case: str) -> None:
    model, x, _ = base_model(base, case, torch.float32)
    adapted = adapt(model, config(variant))
    move(adapted)
    before = adapted(x)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(MergeError, match=r"is quantised .*\(veneer merge --adapter ADAPTER --model BASE\)"):
            merge()
        with pytest.raises(UsageError, match=r"into is 'requantized'; expected .* Did you mean 'requantised'"):
            merge(into="requantized")
    assert torch.equal(adapted(x), before)


@quantised_combinations
@dtypes
@pytest.mark.parametrize("into", ["dequantised", "requantised"])
def test_unmerge_gives_back_the_very_layer(variant: str, base: str, case: str, dtype: torch.dtype, into: str) -> None:
    for option in options(variant, base_model(base, case, dtype)[0].layer):
        model, x, _ = base_model(base, case, dtype)
        frozen, layer = model(x), model.layer
        before = {name: (p, p.clone(), p.data_ptr()) for name, p in layer.named_parameters()}
        adapted = adapt(model, config(variant, **option))
        move(adapted)
        unmerged = adapted(x)
        if into == "requantised" and base == "quantised":
            with pytest.raises(MergeError, match="cannot be given another weight"):
                adapted.merge_adapter(into=into)
            assert torch.equal(adapted(x), unmerged)
            continue
        adapted.merge_adapter(into=into)
        merged = adapted(x)
        assert merged.dtype == dtype
        assert not torch.equal(merged, frozen)
        with adapted.disable_adapter():
            assert torch.equal(adapted(x), frozen)
        assert torch.equal(adapted(x), merged)
        adapted.unmerge_adapter()
        assert adapted.base_model.model.layer.base_layer is layer
        for name, parameter in layer.named_parameters():
            assert parameter is before[name][0]
            assert parameter.data_ptr() == before[name][2]
            assert torch.equal(parameter, before[name][1])
        assert torch.equal(adapted(x), unmerged)


@quantised_combinations
def test_layers_are_kept_as_they_are_in_evaluation_mode(variant: str, base: str, case: str) -> None:
    """bitsandbytes would rewrite a 4-bit weight here, on some processors, and give no gradient afterwards."""
    model, x, _ = base_model(base, case, torch.float32)
    model.layer.__dict__.pop("support_avx512bf16_for_cpu", None)
    if base == "bnb_4bit":
        model.layer.support_avx512bf16_for_cpu = True
    stored = [p.clone() for p in model.layer.parameters()]
    adapted = adapt(model, config(variant))
    move(adapted)
    trained = adapted.train()(x)
    evaluated = adapted.eval()(x)
    again = adapted.train()(x.requires_grad_())
    assert torch.equal(again, trained)
    assert all(torch.equal(p, kept) for p, kept in zip(model.layer.base_layer.parameters(), stored, strict=True))
    again.sum().backward()
    assert x.grad.abs().min() > 0
    if base == "bnb_4bit":
        assert torch.equal(evaluated, trained)
