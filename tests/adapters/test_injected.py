"""Adapters in a model that no PeftModel stands around, and adapters as state dicts."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import AdapterFileError, ConfigError, LoraConfig, PeftModel, UsageError, get_peft_model
from veneer.adapters.injected import (
    adapted_of,
    cast_mixed_precision_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)

FIELDS = {"target_modules": ["q_proj", "v_proj"], "r": 3}
INPUTS = models.batch("llama")


def test_the_model_itself_is_changed_as_in_peft() -> None:
    base = models.make("llama")
    model = inject_adapter_in_model(LoraConfig(**FIELDS), base, "one")
    assert model is base
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), models.make("llama"), "one")
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    ours, right = (
        get_peft_model_state_dict(model, adapter_name="one"),
        peft.get_peft_model_state_dict(theirs, adapter_name="one"),
    )
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in right.items()}


def test_another_adapter_and_another_values() -> None:
    model = inject_adapter_in_model(LoraConfig(**FIELDS), models.make("llama"))
    with pytest.raises(UsageError, match="already an adapter 'default'"):
        inject_adapter_in_model(LoraConfig(**FIELDS), model)
    inject_adapter_in_model(LoraConfig(**FIELDS), model, "more")
    assert adapted_of(model).active_adapters == ["more"]
    models.randomise(model, adapter="more")
    other = inject_adapter_in_model(LoraConfig(**FIELDS), models.make("llama"))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model, adapter_name="more"))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    torch.testing.assert_close(models.output(other, INPUTS), models.output(model, INPUTS))
    twin = copy.deepcopy(other)
    assert adapted_of(twin).model is twin
    torch.testing.assert_close(models.output(twin, INPUTS), models.output(other, INPUTS))


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = models.make("llama")
    before = snapshot(model)
    with pytest.raises(ConfigError):
        inject_adapter_in_model(LoraConfig(target_modules=["nothing"]), model)
    assert_same(before, snapshot(model))
    with pytest.raises(UsageError, match="LlamaForCausalLM has no adapters"):
        get_peft_model_state_dict(model)
    with pytest.raises(UsageError, match="add_adapter"):
        inject_adapter_in_model(LoraConfig(), get_peft_model(model, LoraConfig()))


def test_keys_of_a_state_dict_choose_the_modules(tmp_path: Path) -> None:
    source = get_peft_model(models.make("llama"), LoraConfig(target_modules=["layers.1.mlp.up_proj", "k_proj"]))
    source.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), models.make("llama"), state_dict=state)
    assert set(adapted_of(model).layers) == set(source.base_model.layers)
    with pytest.raises(ConfigError, match="no key of an adapter"):
        inject_adapter_in_model(LoraConfig(), models.make("llama"), state_dict={"weight": torch.zeros(1)})


def test_left_on_the_meta_device_and_filled_later() -> None:
    source = inject_adapter_in_model(LoraConfig(**FIELDS, init_lora_weights=False), models.make("llama"))
    model = inject_adapter_in_model(LoraConfig(**FIELDS), models.make("llama"), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in model.parameters())
    set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    torch.testing.assert_close(models.output(model, INPUTS), models.output(source, INPUTS))


@pytest.mark.parametrize("embeddings", [False, True, "auto"])
def test_a_state_dict_is_what_the_file_holds(embeddings: bool | str, tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(models.make("llama"), LoraConfig(**fields, init_lora_weights=False))
    model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    state, file = (
        get_peft_model_state_dict(model, save_embedding_layers=embeddings),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert state.keys() == file.keys() == load_peft_weights(tmp_path).keys()
    assert all(torch.equal(state[key], file[key]) for key in file)
    assert all(torch.equal(load_peft_weights(tmp_path, device="cpu")[key], file[key]) for key in file)


def test_as_pefts_own_functions_read_it(tmp_path: Path) -> None:
    ours = get_peft_model(models.make("llama"), LoraConfig(**FIELDS, init_lora_weights=False)).eval()
    theirs = peft.get_peft_model(models.make("llama"), peft.LoraConfig(**FIELDS)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    torch.testing.assert_close(models.output(theirs, INPUTS), models.output(ours, INPUTS))
    back = get_peft_model(models.make("llama"), LoraConfig(**FIELDS)).eval()
    set_peft_model_state_dict(back, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(models.output(back, INPUTS), models.output(ours, INPUTS))
    torch.testing.assert_close(models.output(torch.compile(back, backend="eager"), INPUTS), models.output(ours, INPUTS))
    assert (
        get_peft_model_state_dict(torch.compile(back, backend="eager")).keys() == get_peft_model_state_dict(back).keys()
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (inject_adapter_in_model, peft.inject_adapter_in_model),
        (get_peft_model_state_dict, peft.get_peft_model_state_dict),
        (set_peft_model_state_dict, peft.set_peft_model_state_dict),
        (cast_mixed_precision_params, peft.cast_mixed_precision_params),
    ],
)
def test_the_arguments_are_pefts(ours: Callable[..., object], theirs: Callable[..., object]) -> None:
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_half_an_adapter_is_none(change: str) -> None:
    model = get_peft_model(models.make("llama"), LoraConfig(**FIELDS, init_lora_weights=False))
    state = get_peft_model_state_dict(get_peft_model(models.make("llama"), LoraConfig(**FIELDS)))
    key = next(iter(state))
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        state["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = torch.zeros(3, models.D)
    else:
        state[key] = state[key][:1]
    before = snapshot(model)
    with pytest.raises(AdapterFileError, match="state dict does not fit"):
        set_peft_model_state_dict(model, state)
    with pytest.raises(UsageError, match="ignore_mismatched_sizes"):
        set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True)
    with pytest.raises(UsageError, match="no adapter 'x'"):
        set_peft_model_state_dict(model, state, "x")
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_frozen_becomes_half(dtype: torch.dtype) -> None:
    ours = get_peft_model(models.make("llama"), LoraConfig(**FIELDS))
    theirs = peft.get_peft_model(models.make("llama"), peft.LoraConfig(**FIELDS))
    cast_mixed_precision_params(ours, dtype)
    peft.cast_mixed_precision_params(theirs, dtype)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    with pytest.raises(UsageError, match=r"not torch\.float64"):
        cast_mixed_precision_params(ours, torch.float64)


def test_plain_torch_models() -> None:
    model = inject_adapter_in_model(
        LoraConfig(target_modules=["0"], init_lora_weights=False), nn.Sequential(nn.Linear(3, 3))
    )
    assert set(get_peft_model_state_dict(model)) == {"0.lora_A.weight", "0.lora_B.weight"}
    assert not isinstance(model, PeftModel)
