"""Injection is all or nothing, and leaves the rest of the model alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import ConfigError, LoraConfig, TargetError, UsageError, get_peft_model
from veneer.adapters import inject as inject_module
from veneer.adapters import layer as layer_module
from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.saved import ModulesToSaveWrapper
from veneer.inits import kaiming


class StopError(Exception):
    """The failure that the tests force."""


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, step: int, *, late: bool) -> None:
    """Let the ``step``-th call fail, before or after doing its work."""
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != step:
            return real(*args, **kwargs)
        if late:
            real(*args, **kwargs)
        raise StopError

    monkeypatch.setattr(owner, name, failing)


# bert: 4 targets, 1 module saved whole, biases.
CONFIG = {"target_modules": ["query", "value"], "bias": "all", "task_type": "SEQ_CLS", "lora_bias": True}
PLACES = [
    (AdaptedLayer, "attach", 4),
    (AdaptedModel, "hang", 5),
    (kaiming.Init, "fill", 4),
    (ModulesToSaveWrapper, "__init__", 1),
    (inject_module, "_bias_place", 5),
    (layer_module, "holder_for", 8),
    (nn.ModuleDict, "__setitem__", 1),
]
STEPS = [(owner, name, step) for owner, name, steps in PLACES for step in range(1, steps + 1)]


@pytest.mark.parametrize(("owner", "name", "step"), STEPS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("beside", [False, True], ids=["first", "second-adapter"])
def test_a_failure_at_any_step_leaves_the_model_as_it_was(
    owner: Any, name: str, step: int, late: bool, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.make("bert")
    model.bert.pooler.train()
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    peft_model = None
    if beside:
        # The other adapter is on half of the layers, so that some wrappers are there already and some are not.
        peft_model = get_peft_model(model, LoraConfig(**{**CONFIG, "target_modules": ["query"]}), "other")
    before = snapshot(model)
    fail_at(monkeypatch, owner, name, step, late=late)
    try:
        if peft_model is None:
            get_peft_model(model, LoraConfig(**CONFIG))
        else:
            peft_model.add_adapter("new", LoraConfig(**CONFIG))
    except StopError:
        pass
    else:
        assert beside  # with another adapter there are fewer steps
        return
    monkeypatch.undo()
    assert_same(before, snapshot(model))
    if peft_model is None:
        peft_model = get_peft_model(model, LoraConfig(**CONFIG), "other")
    else:
        assert list(peft_model.peft_config) == ["other"]
    peft_model.add_adapter("new", LoraConfig(**CONFIG))
    peft_model.set_adapter("new")
    assert models.output(peft_model, models.batch("bert")).isfinite().all()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["quary"]},
        {"target_modules": ["query"], "exclude_modules": ["nothing"]},
        {"target_modules": ["query"], "modules_to_save": ["nothing"]},
        {"target_modules": ["word_embeddings"], "lora_bias": True},
        {"target_modules": ["encoder"]},
        {"target_modules": ["query"], "rank_pattern": {"key": 3}},
    ],
    ids=str,
)
@pytest.mark.parametrize("beside", [False, True], ids=["first", "second-adapter"])
def test_a_config_that_does_not_fit_leaves_the_model_as_it_was(fields: dict[str, Any], beside: bool) -> None:
    model = models.make("bert")
    peft_model = get_peft_model(model, LoraConfig(), "other") if beside else None
    before = snapshot(model)
    config = LoraConfig(**fields)
    with pytest.raises(ConfigError):
        get_peft_model(model, config) if peft_model is None else peft_model.add_adapter("new", config)
    assert_same(before, snapshot(model))


def test_modes_of_submodules_are_kept() -> None:
    model = models.make("bert").train()
    model.bert.encoder.layer[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    adapted = get_peft_model(model, LoraConfig(target_modules=["query"]))
    assert adapted.training
    assert all(module.training == before[name] for name, module in adapted.unload().named_modules())


def test_everything_but_the_adapter_is_frozen(kind: str) -> None:
    adapted = get_peft_model(models.make(kind), LoraConfig(target_modules="all-linear"))
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert learning


def test_the_given_config_is_not_changed() -> None:
    config = LoraConfig(target_modules="all-linear")
    same = copy.deepcopy(config)
    adapted = get_peft_model(models.make("llama"), config)
    assert config == same
    assert adapted.peft_config["default"] != same


@pytest.mark.parametrize("name", ["default", "a", "my adapter", "a-b_2", "Größe", "x" * 60, "lora_A", "weight"])
def test_names(name: str) -> None:
    adapted = get_peft_model(models.make("llama"), LoraConfig(), name)
    assert adapted.active_adapters == [name]
    adapted.unload()


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "..", "../up", "a/b", "a\\b", "a.b", "/etc", "a\n", "a\0", "-a"),
        *("keys", "pop", "training", "forward", "_modules", "_parameters", "_buffers"),
        *(3, None, b"a"),
    ],
    ids=repr,
)
def test_names_that_cannot_be(name: Any) -> None:
    model = models.make("llama")
    before = snapshot(model)
    with pytest.raises(UsageError, match="cannot name an adapter"):
        get_peft_model(model, LoraConfig(), name)
    assert_same(before, snapshot(model))


def test_a_name_twice() -> None:
    adapted = get_peft_model(models.make("llama"), LoraConfig())
    before = snapshot(adapted)
    with pytest.raises(UsageError, match="already an adapter 'default'"):
        adapted.add_adapter("default", LoraConfig())
    assert_same(before, snapshot(adapted))


def test_an_adapted_model_is_not_adapted_again() -> None:
    adapted = get_peft_model(models.make("llama"), LoraConfig())
    for model in (adapted, adapted.get_base_model(), adapted.base_model):
        with pytest.raises(UsageError, match="already; use"):
            get_peft_model(model, LoraConfig())


def test_adapters_that_would_change_each_others_whole_modules_are_refused() -> None:
    heads = LoraConfig(target_modules=["query"], modules_to_save=["classifier", "bert.pooler"])
    inside = LoraConfig(target_modules=["pooler.dense", "query"])
    itself = LoraConfig(target_modules=["classifier"])
    within = LoraConfig(target_modules=["query"], modules_to_save=["pooler.dense"])
    for first, second in [(heads, inside), (inside, heads), (heads, itself), (itself, heads), (heads, within)]:
        adapted = get_peft_model(models.make("bert"), first)
        before = snapshot(adapted)
        with pytest.raises(UsageError, match="saved whole"):
            adapted.add_adapter("second", second)
        assert_same(before, snapshot(adapted))


def test_a_shared_module_is_wrapped_at_both_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.nested = nn.ModuleDict({"again": self.first})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.nested["again"](self.first(x))

    model = Twice()
    x = torch.randn(2, 4)
    expected = model(x)
    adapted = get_peft_model(model, LoraConfig(target_modules=["first"], init_lora_weights=False))
    assert isinstance(model.first, AdaptedLayer)
    assert model.nested["again"] is model.first
    assert len(adapted.match_report.targets) == 1
    assert not torch.equal(adapted(x), expected)
    base = adapted.unload()
    assert base.nested["again"] is base.first
    assert torch.equal(base(x), expected)


def test_meta_model_costs_no_memory() -> None:
    with torch.device("meta"):
        model = models._MAKERS["llama"]()
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert {p.device.type for p in adapted.parameters()} == {"meta"}


def test_copies_are_independent() -> None:
    adapted = get_peft_model(models.make("llama"), LoraConfig(init_lora_weights=False))
    twin, thawed = copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))
    inputs = models.batch("llama")
    expected = models.output(adapted, inputs)
    for other in (twin, thawed):
        assert torch.equal(models.output(other, inputs), expected)
        models.randomise(other)
        assert not torch.equal(models.output(other, inputs), expected)
    assert torch.equal(models.output(adapted, inputs), expected)


def test_parametrised_layers_are_refused_with_a_reason() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(TargetError, match=r"'0'.*cannot be adapted"):
        get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
