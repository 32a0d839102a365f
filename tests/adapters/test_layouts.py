"""Adapters whose factors are not one pair for each called layer: combined as the updates that they are, or refused."""

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
from veneer.adapters.arithmetic import agreeing_mean
from veneer.adapters.convert import convert, save_as_lora
from veneer.adapters.resize import resize
from veneer.core.errors import UsageError


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,eoi->no", x, self.stack)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(make())


MADE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "experts": (lambda: seeded(Experts), {"target_modules": [], "target_parameters": ["0.stack"]}),
    "attention": (lambda: seeded(lambda: nn.MultiheadAttention(4, 2)), {"target_modules": ["0"]}),
    "tied": (lambda: models.make("llama-tied"), {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
}


EXPERTS = {"0.stack": 3}
"""How many matrices a parameter holds."""


def adapt(kind: str, **other: Any) -> Any:
    """A model with two adapters, the second of them with these fields."""
    make, fields = MADE[kind]
    adapted = veneer.get_peft_model(make(), veneer.LoraConfig(r=2, **fields))
    adapted.add_adapter("second", veneer.LoraConfig(**{"r": 2, **fields, **other}))
    return adapted


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize(("how", "r"), [("cat", 2), ("svd", 2), ("svd", 8), ("magnitude_prune_svd", 8)])
def test_a_combination_is_the_sum_of_the_updates(kind: str, how: str, r: int, tmp_path: Path) -> None:
    adapted = adapt(kind, r=3, use_rslora=True)
    models.randomise(adapted)
    options: dict[str, Any] = {"density": 1.0} if "prune" in how else {}
    options |= {"svd_rank": r} if "svd" in how else {}
    report = adapted.add_weighted_adapter(["default", "second"], [0.5, -2.0], "both", how, **options)
    layers = adapted.base_model.layers
    with torch.no_grad():
        exact = {path: 0.5 * layer.change("default") - 2.0 * layer.change("second") for path, layer in layers.items()}
        found = {path: layer.change("both") for path, layer in layers.items()}
    assert adapted.base_model.layers_of("both").keys() == layers.keys()
    if how == "svd" and r == 2:
        # Of an expert's rank, the best of each expert.
        kept = {record.path: record for record in report or ()}
        for path, update in exact.items():
            parts = zip(update.chunk(EXPERTS.get(path, 1)), found[path].chunk(EXPERTS.get(path, 1)), strict=True)
            for whole, part in parts:
                tail = torch.linalg.svdvals(whole.double())[2:].norm()
                torch.testing.assert_close((whole - part).double().norm(), tail, rtol=1e-4, atol=1e-5)
            if path in kept:
                missed = float((update - found[path]).norm() / update.norm())
                assert kept[path].error == pytest.approx(missed, rel=1e-3, abs=1e-5)
                assert kept[path].kept == pytest.approx(1 - missed**2, rel=1e-3)
        return
    for path, update in exact.items():
        torch.testing.assert_close(found[path], update, rtol=1e-4, atol=1e-5)
    adapted.save_pretrained(tmp_path, selected_adapters=["both"])
    again = veneer.PeftModel.from_pretrained(MADE[kind][0](), tmp_path / "both", "both")
    theirs = again.base_model.layers
    assert theirs.keys() == layers.keys()
    with torch.no_grad():
        for path, layer in theirs.items():
            torch.testing.assert_close(layer.change("both"), found[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear"])
def test_factors_are_combined_place_by_place(kind: str, how: str) -> None:
    adapted = adapt(kind)
    models.randomise(adapted)
    options = {} if how == "linear" else {"density": 1.0}
    adapted.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", how, **options)
    for layer in adapted.base_model.layers.values():
        one, other, both = (layer.tensors(name) for name in ("default", "second", "both"))
        root = layer.scaling["default"] ** 0.5
        for key, tensor in both.items():
            # An attention's output projection is counted twice, which goes into A.
            found = tensor * layer.scaling["both"] if "_A" in key else tensor
            if how == "ties":
                torch.testing.assert_close(found, agreeing_mean([one[key], other[key]], [root, root], "total"))
            else:
                torch.testing.assert_close(found, (one[key] + other[key]) * root)


def test_adapters_of_which_one_shares_the_factors_are_refused() -> None:
    adapted = adapt("tied")
    with pytest.warns(UserWarning, match="does not reach"):
        adapted.add_adapter("alone", veneer.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(UsageError, match=r"(?s)'default' has one update for the embeddings and lm_head .* 'alone' has"):
        adapted.add_weighted_adapter(["default", "alone"], [1.0, 1.0], "both", "cat")
    assert list(adapted.peft_config) == ["default", "second", "alone"]


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


@pytest.mark.parametrize("kind", ["experts", "tied"])
@pytest.mark.parametrize("rank", [None, 1, 3, 0.9])
def test_converted_is_the_best_of_its_rank(kind: str, rank: Any, tmp_path: Path) -> None:
    adapted = adapt(kind, r=3, use_rslora=True, lora_alpha=5)
    models.randomise(adapted, adapter="second")
    save_as_lora(tmp_path, adapted, rank, "second")
    again = veneer.PeftModel.from_pretrained(MADE[kind][0](), tmp_path)
    assert again.peft_config["default"].use_rslora is False
    records = {record.path: record for record in convert(adapted.base_model, "second", rank).layers}
    for path, layer in adapted.base_model.layers.items():
        twin = again.base_model.layers[path]
        with torch.no_grad():
            whole, part = layer.change("second").double(), twin.change("default").double()
        tails = [torch.linalg.svdvals(each)[twin.r["default"] :].norm() for each in whole.chunk(EXPERTS.get(path, 1))]
        missed = float((whole - part).norm())
        assert missed == pytest.approx(float(torch.stack(tails).norm()), rel=1e-4, abs=1e-5)
        assert (twin.r["default"] == rank) if isinstance(rank, int) else missed <= 0.33 * float(whole.norm())
        if path in records and rank is not None:
            assert records[path].error == pytest.approx(missed / float(whole.norm()), rel=1e-3, abs=1e-5)
            assert records[path].r_before == 3


def test_converting_an_attention_is_refused() -> None:
    with pytest.raises(UsageError, match="an attention whose two weights have one rank"):
        convert(adapt("attention").base_model, "default")


@pytest.mark.parametrize("kind", ["experts", "tied"])
def test_resizing_is_refused(kind: str, tmp_path: Path) -> None:
    adapt(kind).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="resizing knows one pair"):
        resize(files.read(tmp_path), 1)
