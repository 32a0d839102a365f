"""LoRA+ and LoRA-FA against PEFT's optimisers: the same groups, the same steps."""

from __future__ import annotations

import warnings
from typing import Any

import peft.optimizers
import pytest
import torch
from peft.optimizers import lorafa
from torch import nn

import veneer
from tests import models
from veneer import ConfigError, UsageError
from veneer.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

F64 = torch.float64


def both(kind: str, **fields: Any) -> tuple[peft.PeftModel, veneer.PeftModel]:
    made = []
    for library in (peft, veneer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's remarks on task heads
            model = library.get_peft_model(models.make(kind, dtype=F64), library.LoraConfig(**fields))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(sum(map(ord, name)))
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=F64))
        made.append(model)
    return made[0], made[1]


def step(model: nn.Module, kind: str, optimiser: torch.optim.Optimizer, seed: int) -> None:
    optimiser.zero_grad()
    models.output(model, models.batch(kind, seed=seed, dtype=F64)).square().mean().backward()
    optimiser.step()


def same(theirs: nn.Module, ours: nn.Module) -> None:
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(mine[name], parameter, rtol=1e-9, atol=1e-12, msg=name)


PLUS = [
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("bert", {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS", "modules_to_save": ["LayerNorm"]}),
    ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    ("opt", {"target_modules": ["q_proj"], "lora_bias": True}),
]


@pytest.mark.parametrize(("kind", "fields"), PLUS)
def test_loraplus_has_pefts_groups(kind: str, fields: dict[str, Any]) -> None:
    groups = []
    for model, library in zip(both(kind, **fields), (peft.optimizers, veneer.optimizers), strict=True):
        options = {"lr": 0.01, "loraplus_lr_ratio": 8, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 3e-4}
        optimiser = library.create_loraplus_optimizer(model, torch.optim.AdamW, **options, betas=(0.8, 0.9))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups.append(
            [
                ({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"], group["betas"])
                for group in optimiser.param_groups
            ]
        )
    assert groups[0] == groups[1]


def test_loraplus_steps_are_pefts() -> None:
    theirs, ours = both("llama", target_modules=["q_proj", "embed_tokens"])
    options = {"lr": 0.01, "loraplus_lr_ratio": 8}
    optimisers = (
        peft.optimizers.create_loraplus_optimizer(theirs, torch.optim.SGD, **options),
        create_loraplus_optimizer(ours, torch.optim.SGD, **options),
    )
    for number in range(3):
        for model, optimiser in zip((theirs, ours), optimisers, strict=True):
            step(model, "llama", optimiser, number)
    same(theirs, ours)


@pytest.mark.parametrize("option", ["lr", "loraplus_lr_ratio", "loraplus_lr_embedding"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "4"])
def test_loraplus_refuses_what_is_no_rate(option: str, value: Any) -> None:
    model = veneer.get_peft_model(models.make("llama"), veneer.LoraConfig(target_modules=["q_proj"]))
    options = {"lr": 0.1, "loraplus_lr_ratio": 2.0} | {option: value}
    with pytest.raises(ConfigError, match=option):
        create_loraplus_optimizer(model, torch.optim.AdamW, **options)


def test_loraplus_without_a_B_is_refused() -> None:
    vera = veneer.get_peft_model(models.make("llama"), veneer.VeraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="no lora_B that learns"):
        create_loraplus_optimizer(vera, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=2.0)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 6, "rank_pattern": {"up_proj": 2}}),
        ("llama", {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True}),
        ("bert", {"target_modules": ["query"], "r": 4, "lora_alpha": 6, "task_type": "SEQ_CLS", "bias": "all"}),
    ],
)
def test_lorafa_steps_are_pefts(kind: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT rounds the projected gradient to bfloat16 where the machine has it; this compares the method, not that.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    theirs, ours = both(kind, **fields)
    optimisers = [
        library.create_lorafa_optimizer(model, 4, 6, 0.01, weight_decay=0.1)
        for model, library in ((theirs, peft.optimizers), (ours, veneer.optimizers))
    ]
    frozen = {name: p.clone() for name, p in ours.named_parameters() if "lora_A" in name}
    for number in range(4):
        for model, optimiser in zip((theirs, ours), optimisers, strict=True):
            step(model, kind, optimiser, number)
    same(theirs, ours)
    for name, parameter in ours.named_parameters():
        if name in frozen:
            assert not parameter.requires_grad
            assert torch.equal(parameter, frozen[name])


def test_lorafa_refuses_what_it_cannot_mean() -> None:
    def model(**fields: Any) -> veneer.PeftModel:
        return veneer.get_peft_model(
            models.make("llama"), veneer.LoraConfig(**{"target_modules": ["q_proj"], **fields})
        )

    with pytest.raises(ConfigError, match="r=9 is not what 'default' has, which is 8"):
        create_lorafa_optimizer(model(), 9, 8, 0.1)
    with pytest.raises(ConfigError, match="lora_alpha=9"):
        create_lorafa_optimizer(model(), 8, 9, 0.1)
    with pytest.raises(ConfigError, match="use_rslora=True"):
        create_lorafa_optimizer(model(), 8, 8, 0.1, use_rslora=True)
    with pytest.raises(UsageError, match="starts at zero on an embedding"):
        create_lorafa_optimizer(model(target_modules=["embed_tokens"]), 8, 8, 0.1)
    vera = veneer.get_peft_model(models.make("llama"), veneer.VeraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="of type VERA"):
        create_lorafa_optimizer(vera, 4, 4, 0.1)


def test_a_closure_is_called_with_gradients_on() -> None:
    model = veneer.get_peft_model(models.make("llama"), veneer.LoraConfig(target_modules=["q_proj"]))
    optimiser = create_lorafa_optimizer(model, 8, 8, 0.1)

    def closure() -> torch.Tensor:
        loss = models.output(model, models.batch("llama")).square().mean()
        loss.backward()
        return loss

    first = optimiser.step(closure)
    assert optimiser.step(closure).item() != first.item()
