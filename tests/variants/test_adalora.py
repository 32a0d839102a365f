"""AdaLoRA against PEFT: files, outputs, gradients, and every step of the budget on the same gradients."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import veneer
from tests import models
from veneer import AdaLoraConfig, ConfigError, PeftConfig, UsageError
from veneer.adapters.budget import RankBudget, orthogonality

F64 = torch.float64
FIELDS: dict[str, Any] = {
    "init_r": 4,
    "target_r": 2,
    "lora_alpha": 6,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": 12,
    "target_modules": ["q_proj", "up_proj"],
}


class Net(nn.Module):
    """Four layers with a loss in float64, which transformers' models compute in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(6, 8), "up_proj": nn.Linear(8, 6)}) for _ in "ab"
        )

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        for layer in self.layers:
            x = x + layer["up_proj"](torch.tanh(layer["q_proj"](x)))
        return SimpleNamespace(logits=x, loss=x.square().mean())


def net() -> nn.Module:
    torch.manual_seed(3)
    return Net().to(F64)


def make(kind: str) -> nn.Module:
    return net() if kind == "net" else models.make(kind, dtype=F64)


def peft_model(kind: str, fields: dict[str, Any]) -> peft.PeftModel:
    model = peft.get_peft_model(make(kind), peft.AdaLoraConfig(**fields))
    # The rank that the update is divided by is a parameter there, which a move to another dtype lets learn.
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    return model


def both(kind: str = "net", **more: Any) -> tuple[peft.PeftModel, veneer.PeftModel]:
    """PEFT's model and ours with the same adapter, moved off its start."""
    fields = FIELDS | more
    theirs = peft_model(kind, fields)
    ours = veneer.get_peft_model(make(kind), AdaLoraConfig(**fields))
    torch.manual_seed(1)
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
                mine[name].copy_(parameter)
    assert {n for n, p in mine.items() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    return theirs, ours


def batch(seed: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=F64)


def peft_lists(theirs: peft.PeftModel) -> dict[str, list[bool]] | None:
    found = theirs.peft_config["default"].rank_pattern
    return None if found is None else {name.replace(".default", ""): kept for name, kept in found.items()}


def test_every_step_of_a_training_is_pefts() -> None:
    theirs, ours = both()
    optimisers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02) for model in (theirs, ours)
    ]
    masks = []
    for step in range(1, 13):
        for model, optimiser in zip((theirs.train(), ours.train()), optimisers, strict=True):
            loss = model.base_model(batch(step)).loss
            loss.backward()
            optimiser.step()
            model.base_model.update_and_allocate(step)
            optimiser.zero_grad()
        allocator = theirs.base_model.rankallocator
        budget = ours.base_model.budgets["default"]
        assert allocator.exp_avg_ipt.keys() == {f"{path}.{key}.default" for path, key in budget.sensitivity}
        for path, key in budget.sensitivity:
            name = f"{path}.{key}.default"
            torch.testing.assert_close(
                budget.sensitivity[path, key], allocator.exp_avg_ipt[name], rtol=1e-8, atol=1e-14
            )
            torch.testing.assert_close(
                budget.uncertainty[path, key], allocator.exp_avg_unc[name], rtol=1e-8, atol=1e-14
            )
        assert ours.peft_config["default"].rank_pattern == peft_lists(theirs)
        masks.append(copy.deepcopy(peft_lists(theirs)))
        mine = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(mine[name], parameter, rtol=1e-7, atol=1e-10, msg=name)
    # The budget moved, and ended where it should.
    assert masks[2] is None
    assert len({json.dumps(mask, sort_keys=True) for mask in masks if mask is not None}) > 1
    assert sum(sum(kept) for kept in masks[-1].values()) == 2 * len(masks[-1])


def test_files_go_both_ways_at_the_ranks_that_stayed(tmp_path: Path) -> None:
    theirs, ours = both()
    for model in (theirs.train(), ours.train()):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for step in range(1, 13):
            model.base_model(batch(step)).loss.backward()
            optimiser.step()
            model.base_model.update_and_allocate(step)
            optimiser.zero_grad()
    inputs = batch(99)
    expected = ours.eval()(inputs).logits
    with warnings.catch_warnings():
        # PEFT takes a layer without any rank for a broken one; that it loads is seen below.
        warnings.filterwarnings("ignore", message=".*invalid shape.*")
        theirs.save_pretrained(str(tmp_path / "theirs"))
    ours.save_pretrained(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        loaded = veneer.PeftModel.from_pretrained(net(), tmp_path / folder)
        torch.testing.assert_close(loaded(inputs).logits, expected, rtol=1e-9, atol=1e-9)
        with warnings.catch_warnings():
            # It takes its own pattern for one of LoRA's.
            warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match.*")
            back = peft.PeftModel.from_pretrained(net(), str(tmp_path / folder)).eval()
        torch.testing.assert_close(back(inputs).logits, expected, rtol=1e-9, atol=1e-9)
        loaded.save_pretrained(tmp_path / f"{folder}-again")
        a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in (folder, f"{folder}-again"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    assert {**a, "target_modules": None} == {**b, "target_modules": None}
    shapes = [
        tensor.shape
        for key, tensor in load_file(tmp_path / "ours" / "adapter_model.safetensors").items()
        if "_E" in key
    ]
    assert sum(shape[0] for shape in shapes) == 2 * len(shapes)
    assert {shape[1] for shape in shapes} == {1}


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"]), ("vit", ["projection"])]
)
def test_outputs_gradients_and_merged_weights_are_pefts(kind: str, targets: list[str], tmp_path: Path) -> None:
    fields = FIELDS | {"target_modules": targets, "fan_in_fan_out": kind == "gpt2"}
    theirs = peft_model(kind, fields)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path))
    ours = veneer.PeftModel.from_pretrained(models.make(kind, dtype=F64), tmp_path, is_trainable=True)
    inputs = models.batch(kind, dtype=F64)
    grads = []
    for model in (theirs.eval(), ours.eval()):
        out = models.output(model, inputs)
        (out * torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)).sum().backward()
        grads.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(grads[1][0], grads[0][0], rtol=1e-9, atol=1e-9)
    assert grads[1][1].keys() == grads[0][1].keys()
    for name, gradient in grads[0][1].items():
        torch.testing.assert_close(grads[1][1][name], gradient, rtol=1e-9, atol=1e-9)
    merged, expected = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-12, atol=1e-12)


def test_the_penalty_is_added_to_the_loss_of_training_alone() -> None:
    theirs, ours = both(orth_reg_weight=0.7)
    # Without a task type PEFT's outer model goes past its own penalty.
    torch.testing.assert_close(
        ours.train()(batch(1)).loss, theirs.train().base_model(batch(1)).loss, rtol=1e-10, atol=0
    )
    # PEFT adds it to a held-out loss too.
    plain = net()
    with ours.disable_adapter():
        torch.testing.assert_close(ours.eval()(batch(1)).loss, plain(batch(1)).loss)
    layers = ours.base_model.layers
    assert (theirs.base_model(batch(1)).loss - ours(batch(1)).loss).item() == pytest.approx(
        0.7 * orthogonality(layers, "default").item()
    )
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    without = ours(batch(1)).loss
    assert torch.equal(ours.train()(batch(1)).loss, without)


def test_the_schedule_is_pefts_but_for_its_last_step() -> None:
    theirs, ours = both()
    budget = RankBudget("default", ours.peft_config["default"], ours.base_model.layers)
    for step in range(9):
        assert budget.at(step) == theirs.base_model.rankallocator.budget_schedule(step), step
    assert [budget.at(step) for step in (9, 10, 12)] == [(8, True), (8, False), (8, False)]


def test_equal_scores_still_end_at_the_budget() -> None:
    """At the start L is zero, so that no vector has a gradient; PEFT's threshold then takes every entry away."""
    ours = veneer.get_peft_model(models.make("llama"), AdaLoraConfig(**FIELDS))
    budget = RankBudget("default", ours.peft_config["default"], ours.base_model.layers)
    budget.observe()
    budget.allocate(9)
    assert sum(sum(kept) for kept in ours.peft_config["default"].rank_pattern.values()) == 9
    budget.allocate(16)
    assert sum(sum(kept) for kept in ours.peft_config["default"].rank_pattern.values()) == 16


def test_without_an_adapter_that_learns_there_is_no_budget() -> None:
    lora = veneer.get_peft_model(models.make("llama"), veneer.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="no active adapter is an AdaLoRA adapter that learns"):
        lora.base_model.update_and_allocate(1)
    frozen = veneer.get_peft_model(models.make("llama"), AdaLoraConfig(**FIELDS, inference_mode=True))
    with pytest.raises(UsageError, match="no active adapter"):
        frozen.base_model.update_and_allocate(1)


def test_layers_that_are_not_one_matrix_of_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="AdaLoRA has no meaning on Embedding"):
        veneer.get_peft_model(nn.Sequential(nn.Embedding(5, 4)), AdaLoraConfig(**{**FIELDS, "target_modules": ["0"]}))


GOOD = [
    *[("init_r", 4), ("target_r", 3), ("deltaT", 5), ("tinit", 3), ("tfinal", 7), ("total_step", 12)],
    *[("beta1", 0.5), ("beta2", 0.99), ("orth_reg_weight", 0), ("orth_reg_weight", 0.1), ("lora_alpha", 0.5)],
    *[("lora_dropout", 0.3), ("init_lora_weights", False), ("rank_pattern", None), ("r", 8)],
    ("rank_pattern", {"a.lora_E": [True, False, False, True]}),
    *[("bias", value) for value in ("none", "all", "lora_only")],
]


@pytest.mark.parametrize(("name", "value"), GOOD, ids=str)
def test_accepted_values_survive_the_file(name: str, value: Any) -> None:
    config = AdaLoraConfig(**FIELDS | {name: value})
    again = PeftConfig.from_dict(json.loads(config.to_json()), source="file")
    assert getattr(again, name) == value == getattr(peft.AdaLoraConfig(**FIELDS | {name: value}), name)


BAD = [
    *[("init_r", 0), ("target_r", 0), ("target_r", 5), ("deltaT", 0), ("tinit", -1), ("tfinal", 1.5), ("tinit", 9)],
    *[("total_step", None), ("total_step", 0), ("total_step", 5), ("beta1", 0), ("beta2", 1), ("orth_reg_weight", -1)],
    *[("lora_alpha", 0), ("lora_dropout", 1), ("init_lora_weights", "pissa"), ("bias", "vera_only")],
    *[("rank_pattern", {"a": [True]}), ("rank_pattern", {"a.lora_E": 3}), ("rank_pattern", [1])],
    *[("use_dora", True), ("use_rslora", True), ("alpha_pattern", {"q": 3}), ("lora_bias", True)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_refused_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        AdaLoraConfig(**FIELDS | {name: value})


def test_r_is_not_used_and_that_is_said() -> None:
    with pytest.warns(UserWarning, match="does not use r=5"):
        AdaLoraConfig(**FIELDS, r=5)


def test_fields_and_defaults_are_pefts() -> None:
    theirs = {f.name for f in dataclasses.fields(peft.AdaLoraConfig)}
    ours = {f.name for f in dataclasses.fields(AdaLoraConfig)}
    assert theirs == ours | set(AdaLoraConfig.not_built) | {"runtime_config"}
    a, b = peft.AdaLoraConfig(total_step=9).to_dict(), AdaLoraConfig(total_step=9).to_dict()
    skipped = {"peft_type", "peft_version", "runtime_config"}
    assert {k: v for k, v in a.items() if k not in skipped} == {k: v for k, v in b.items() if k not in skipped}
