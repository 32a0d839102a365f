"""Which strategy runs, what is refused with it, and that something else than was asked for does not run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from tests import chat
from veneer.core.errors import ConfigError, UsageError
from veneer.train import strategy, zero
from veneer.train.config import RunConfig


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


def config(**values: Any) -> RunConfig:
    return RunConfig(output="run", **values)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if DeepSpeed were there: these tests ask for it and do not run it."""
    monkeypatch.setattr(zero, "check_installed", lambda: None)


@pytest.mark.parametrize(
    ("asked", "found"), [("auto", "ddp"), ("ddp", "ddp"), ("fsdp", "fsdp"), ("deepspeed", "deepspeed")]
)
def test_a_run_says_its_strategy(asked: str, found: str) -> None:
    assert strategy.chosen(config(strategy=asked)) == found


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("auto", [True, False])
def test_accelerate_says_it(kind: str, auto: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert strategy.chosen(config(strategy="auto" if auto else kind)) == kind


def test_two_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="accelerate is configured for fsdp, but strategy is ddp"):
        strategy.chosen(config(strategy="ddp"))


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_what_is_not_offered_is_refused(variable: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UsageError, match=f"accelerate is configured for {name}, which veneer does not offer"):
        strategy.chosen(config())


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version to 2"),
        ({}, "set fsdp_version to 2"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "checkpoint=on"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS is not for"),
        ({"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "split at its layers"),
        ({"FSDP_VERSION": "2", "FSDP_IGNORED_MODULES": "lm_head"}, "split at its layers"),
    ],
)
def test_settings_of_accelerate_that_cannot_be_kept(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        strategy.chosen(config())


@pytest.mark.parametrize(
    "values", [{"quantize": "nf4"}, {"family": "adalora"}, {"optimizer": "adamw_8bit"}, {"optimizer": "adafactor"}]
)
@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_what_needs_whole_tensors_is_not_split(kind: str, values: dict[str, Any]) -> None:
    name, value = next(iter(values.items()))
    with pytest.raises(ConfigError, match=f"{name}={value} .* so strategy={kind} cannot train it; use strategy=ddp"):
        strategy.chosen(config(strategy=kind, **values))


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_one_process_has_nothing_to_split(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UsageError, match=f"strategy={kind} .*, and this is one; start them with torchrun"):
        strategy.chosen(config(strategy=kind))


def accelerator(kind: DistributedType, made: Any = None) -> Any:
    """Only what is asked of one."""
    return SimpleNamespace(
        distributed_type=kind,
        num_processes=2,
        device=torch.device("cpu"),
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace()),
        prepare=lambda model, optimiser: (made or model, optimiser),
    )


def test_a_model_is_split_at_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    fsdp = accelerator(DistributedType.FSDP)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    assert "at LlamaDecoderLayer" in strategy.check_model(fsdp, chat.model())[0]
    assert fsdp.state.fsdp_plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert strategy.check_model(accelerator(DistributedType.MULTI_CPU), nn.Linear(2, 2)) == ()


def test_models_that_cannot_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    fsdp = accelerator(DistributedType.FSDP)
    with pytest.raises(ConfigError, match="this one has none"):
        strategy.check_model(fsdp, nn.Linear(2, 2))
    model = chat.model()
    model.lm_head.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="cannot split a quantised model"):
        strategy.check_model(fsdp, model)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaMLP")
    with pytest.raises(ConfigError, match="is LlamaMLP; this model is split at LlamaDecoderLayer"):
        strategy.check_model(fsdp, chat.model())


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.MULTI_CPU])
def test_another_strategy_than_was_asked_for_does_not_run(kind: DistributedType) -> None:
    model = chat.model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=f"by {kind.value}, but does not: accelerate made a LlamaForCausalLM"):
        strategy.spread(accelerator(kind), model, optimiser)


@pytest.mark.parametrize(("before", "now"), [("fsdp", "ddp"), ("deepspeed", "fsdp")])
def test_a_process_keeps_to_one_strategy(before: str, now: Any) -> None:
    with pytest.raises(UsageError, match=f"trained with strategy={before} before; train with {now} in a new one"):
        strategy.enter(accelerator(DistributedType(before.upper())), now, config())


@pytest.mark.parametrize("stage", [2, 3])
def test_what_zero_does_is_said(stage: int) -> None:
    deepspeed = accelerator(DistributedType.DEEPSPEED)
    deepspeed.state.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
    (note,) = strategy.check_model(deepspeed, chat.model())
    assert note.startswith(f"ZeRO-{stage}: ")
    assert ("at LlamaDecoderLayer" in note) == (stage == 3)
