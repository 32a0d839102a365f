"""The status of adapters, beside PEFT's of the same ones."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import veneer
from tests import models
from veneer import UsageError, get_layer_status, get_model_status, get_peft_model
from veneer.adapters.status import TunerLayerStatus, TunerModelStatus

pytestmark = [
    # PEFT's, about what it then does by itself.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
]


class Attention(nn.Module):
    """What no tiny transformers model has: packed attention and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.conv = nn.MultiheadAttention(4, 2), nn.Conv2d(3, 4, 1)


def pair(kind: str, *configs: dict[str, Any], family: str = "LoraConfig") -> tuple[Any, Any]:
    """The same adapters, "one" and "two", by PEFT and here."""
    made = []
    for package in (peft, veneer):
        base = Attention() if kind == "attention" else models.make(kind)
        config = [getattr(package, family)(**each) for each in configs]
        model = package.get_peft_model(base, config[0], "one")
        for name, more in zip(["two"], config[1:], strict=False):
            model.add_adapter(name, more)
        made.append(model)
    return made[0], made[1]


def assert_same(theirs: Any, mine: Any, *, but: tuple[str, ...] = ()) -> None:
    """Every field of every layer and of the model."""
    assert [asdict(layer) for layer in mine.get_layer_status()] == [asdict(x) for x in theirs.get_layer_status()]
    found, wanted = asdict(mine.get_model_status()), asdict(theirs.get_model_status())
    assert {k: v for k, v in found.items() if k not in but} == {k: v for k, v in wanted.items() if k not in but}


def test_the_fields_are_pefts() -> None:
    for mine, theirs in (
        (TunerLayerStatus, peft.peft_model.TunerLayerStatus),
        (TunerModelStatus, peft.peft_model.TunerModelStatus),
    ):
        assert [field.name for field in fields(mine)] == [field.name for field in fields(theirs)]


@pytest.mark.parametrize("kind", models.MODELS)
def test_every_kind_of_model(kind: str) -> None:
    theirs, mine = pair(kind, {"r": 2, "target_modules": "all-linear"})
    assert_same(theirs, mine)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2]}),
        ("attention", {"target_modules": ["mha", "conv"]}),
    ],
)
def test_every_kind_of_layer(kind: str, config: dict[str, Any]) -> None:
    theirs, mine = pair(kind, {"r": 2, **config})
    # PEFT counts the table that stands behind trained rows, and the magnitudes, in its own way.
    assert_same(theirs, mine, but=("total_params",))


@pytest.mark.parametrize(
    ("family", "config"),
    [("AdaLoraConfig", {"total_step": 10, "init_r": 3, "target_r": 2}), ("VeraConfig", {"r": 3})],
)
def test_every_family(family: str, config: dict[str, Any]) -> None:
    theirs, mine = pair("llama", {"target_modules": ["q_proj"], **config}, family=family)
    # PEFT keeps AdaLoRA's number of ranks as a frozen parameter, and counts it.
    assert_same(theirs, mine, but=("total_params",) if family == "AdaLoraConfig" else ())


def test_several_adapters_and_modules_saved_whole() -> None:
    first = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    theirs, mine = pair("bert", first, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"})
    # PEFT counts the original head, which is not in use.
    assert_same(theirs, mine, but=("total_params",))
    for model in (theirs, mine):
        model.set_adapter("two")
    assert_same(theirs, mine, but=("total_params",))
    for model in (theirs, mine):
        model.base_model.model.classifier.modules_to_save["two"].weight.requires_grad_(False)
    assert mine.get_model_status().requires_grad == {"one": False, "two": "irregular"}
    assert_same(theirs, mine, but=("total_params",))


def test_merged_adapters() -> None:
    config = {"r": 2, "target_modules": ["q_proj"]}
    theirs, mine = pair("llama", config, {"r": 2, "target_modules": ["q_proj", "v_proj"]})
    for model in (theirs, mine):
        model.merge_adapter(["one"])
    assert mine.get_model_status().merged_adapters == ["one"]
    assert_same(theirs, mine)
    for model in (theirs, mine):
        model.unmerge_adapter()
        model.merge_adapter(["one", "two"])
    assert mine.get_model_status().merged_adapters == ["one", "two"]
    assert_same(theirs, mine)


def test_what_is_merged_in_part_is_irregular() -> None:
    theirs, mine = pair("llama", {"r": 2, "target_modules": ["q_proj", "v_proj"]})
    theirs.base_model.model.model.layers[0].self_attn.q_proj.merge(adapter_names=["one"])
    mine.base_model.model.model.layers[0].self_attn.q_proj.merged_adapters.append("one")
    assert mine.get_model_status().merged_adapters == "irregular"
    assert_same(theirs, mine)


def test_a_module_saved_whole_has_nothing_to_merge() -> None:
    theirs, mine = pair("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"})
    for model in (theirs, mine):
        model.merge_adapter()
    assert theirs.get_model_status().merged_adapters == "irregular"
    assert mine.get_model_status().merged_adapters == ["one"]
    assert_same(theirs, mine, but=("merged_adapters", "total_params"))


def test_disabled_adapters() -> None:
    theirs, mine = pair("llama", {"target_modules": ["q_proj"]})
    with theirs.disable_adapter(), mine.disable_adapter():
        assert mine.get_model_status().enabled is theirs.get_model_status().enabled is False
        assert not any(layer.enabled for layer in mine.get_layer_status())
    assert_same(theirs, mine)


def test_rows_that_are_merged() -> None:
    _, mine = pair("llama", {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1]})
    mine.merge_adapter()
    assert mine.get_model_status().merged_adapters == ["one"]


def test_tensors_that_were_not_filled() -> None:
    model = get_peft_model(models.make("llama"), veneer.LoraConfig(target_modules=["q_proj"]), low_cpu_mem_usage=True)
    assert model.get_model_status().devices == {"default": ["meta"]}


def test_a_model_that_adapters_were_injected_into() -> None:
    config = {"r": 2, "target_modules": ["q_proj"]}
    mine = veneer.inject_adapter_in_model(veneer.LoraConfig(**config), models.make("llama"))
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**config), models.make("llama"))
    assert [asdict(x) for x in get_layer_status(mine)] == [asdict(x) for x in peft.get_layer_status(theirs)]
    assert asdict(get_model_status(mine)) == asdict(peft.get_model_status(theirs))
    torch.manual_seed(0)
    plain = veneer.inject_adapter_in_model(veneer.LoraConfig(r=1, target_modules=["0"]), nn.Sequential(nn.Linear(3, 3)))
    assert get_model_status(plain).base_model_type == "other"


def test_a_quantised_base() -> None:
    pytest.importorskip("bitsandbytes")
    from tests.contract.bases import cases_of

    for kind, backend in (("bnb_4bit", "bnb 4bit"), ("bnb_8bit", "bnb 8bit")):
        case = next(iter(cases_of(kind).values()))
        layer = case.quantise(case.module())
        name = type(layer).__name__
        model = get_peft_model(nn.ModuleDict({"layer": layer}), veneer.LoraConfig(r=2, target_modules=["layer"]))
        (status,) = model.get_layer_status()
        assert (status.quantization_backend, status.module_type) == (backend, f"lora.{name}")
        assert model.get_model_status().quantization_backend == backend


def test_a_model_without_adapters() -> None:
    for ask in (get_layer_status, get_model_status):
        with pytest.raises(UsageError, match="has no adapters"):
            ask(models.make("llama"))


def test_peft_still_calls_its_layers_so() -> None:
    """The words for kinds of layers are read from PEFT's own representation."""
    model = peft.get_peft_model(models.make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert {repr(layer).partition("(")[0] for layer in layers} == {"lora.Linear"}
