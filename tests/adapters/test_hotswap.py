"""Another adapter in the place of one that is loaded: equal to loading it, and nothing is compiled again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import LoraConfig, PeftModel, UsageError, get_peft_model
from veneer.adapters.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from veneer.adapters.injected import inject_adapter_in_model
from veneer.adapters.lifecycle import rescale_adapter_scale

INPUTS = models.batch("llama")
CONFIGS: dict[str, dict[str, Any]] = {
    "same": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "smaller": {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "larger": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "fewer": {"r": 3, "target_modules": ["v_proj"]},
    "other": {"r": 5, "lora_alpha": 3, "target_modules": ["down_proj", "q_proj"]},
    "patterned": {
        "r": 2,
        "rank_pattern": {"q_proj": 6},
        "alpha_pattern": {"v_proj": 1},
        "target_modules": ["q_proj", "v_proj"],
    },
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved adapter of each kind."""
    found = {}
    for seed, (name, fields) in enumerate(CONFIGS.items()):
        model = get_peft_model(models.make("llama"), LoraConfig(**fields))
        models.randomise(model, seed=seed)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


def out(model: Any) -> Tensor:
    with torch.no_grad():
        return models.output(model, INPUTS)


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(models.make("llama"), folder)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_compiled_once_for_all(backend: str, folders: dict[str, Path]) -> None:
    model = loaded(folders["same"])
    before = out(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8, target_modules=["down_proj"])
    torch.testing.assert_close(out(model), before)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(out(compiled), before)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    graphs = counters["stats"]["unique_graphs"]
    for name in (*CONFIGS, "same"):
        hotswap_adapter(compiled, folders[name], "default")
        torch.testing.assert_close(out(compiled), out(loaded(folders[name])), atol=2e-6, rtol=2e-5)
        assert counters["stats"]["unique_graphs"] == graphs == 1
    with rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(out(compiled), out(model))
        assert not torch.allclose(out(compiled), before)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["recompiles"]
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


@pytest.mark.parametrize("name", ["same", "smaller", "fewer"])
def test_without_preparing_a_smaller_one_fits(name: str, folders: dict[str, Path]) -> None:
    model = loaded(folders["same"])
    hotswap_adapter(model, folders[name], "default")
    torch.testing.assert_close(out(model), out(loaded(folders[name])))


def test_as_in_peft(folders: dict[str, Path]) -> None:
    ours, theirs = loaded(folders["same"]), peft.PeftModel.from_pretrained(models.make("llama"), str(folders["same"]))
    peft_hotswap_adapter(theirs, str(folders["fewer"]), "default")
    hotswap_adapter(ours, folders["fewer"], "default")
    torch.testing.assert_close(out(ours), out(theirs))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stands_in_a_prepared_place_is_saved_right(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """PEFT leaves the old alpha beside the new rank."""
    model = loaded(folders["same"])
    prepare_model_for_compiled_hotswap(model, target_rank=8, target_modules=["down_proj"])
    model.save_pretrained(tmp_path / "prepared")
    torch.testing.assert_close(out(loaded(tmp_path / "prepared")), out(loaded(folders["same"])))
    hotswap_adapter(model, folders[name], "default")
    model.save_pretrained(tmp_path / "swapped")
    torch.testing.assert_close(out(loaded(tmp_path / "swapped")), out(model))
    assert {target.r for target in model.match_report.targets} == {8}
    assert model.match_report.trainable == sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)


def test_life_goes_on_in_a_prepared_place(folders: dict[str, Path]) -> None:
    model = loaded(folders["same"])
    model.load_adapter(folders["larger"], "b")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, folders["smaller"], "default")
    before = out(model)
    model.merge_adapter()
    torch.testing.assert_close(out(model), before)
    model.unmerge_adapter()
    model.rename_adapter("default", "z")
    torch.testing.assert_close(out(model), before)
    names = ["b", "z"]
    mixed = models.output(model, {**INPUTS, "adapter_names": names})
    for number, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[number], out(model)[number])
    model.set_adapter("b")
    model.delete_adapter("z")
    torch.testing.assert_close(out(model), out(loaded(folders["larger"])))


def test_a_prepared_adapter_learns(folders: dict[str, Path]) -> None:
    plain, prepared = (
        PeftModel.from_pretrained(models.make("llama"), folders["same"], is_trainable=True) for _ in "ab"
    )
    prepare_model_for_compiled_hotswap(prepared)
    for model in (plain, prepared):
        models.output(model, INPUTS).square().sum().backward()
    right = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    here = {name: p.grad for name, p in prepared.named_parameters() if p.grad is not None}
    assert here.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(here[name], right[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "bias", "start"])
def test_other_layers_biases_and_starts(kind: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "embedding": {"target_modules": ["wpe", "c_fc"]},
        "conv1d": {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
        "start": {"target_modules": ["c_attn"], "init_lora_weights": "pissa"},
        "bias": {"target_modules": ["c_attn"], "lora_bias": True, "bias": "lora_only"},
    }[kind]
    for name, r in (("a", 4), ("b", 2)):
        model = get_peft_model(models.make("gpt2"), LoraConfig(r=r, **fields))
        models.randomise(model, seed=r)
        model.save_pretrained(tmp_path / name)
    right = PeftModel.from_pretrained(models.make("gpt2"), tmp_path / "b")
    model = PeftModel.from_pretrained(models.make("gpt2"), tmp_path / "a")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    before = out(model)
    hotswap_adapter(model, tmp_path / "b", "default")
    torch.testing.assert_close(out(model), out(right), atol=1e-5, rtol=1e-4)
    hotswap_adapter(model, tmp_path / "a", "default")
    torch.testing.assert_close(out(model), before)


def test_in_an_injected_model(folders: dict[str, Path]) -> None:
    model = inject_adapter_in_model(LoraConfig(**CONFIGS["same"]), models.make("llama"))
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, folders["larger"], "default")
    torch.testing.assert_close(out(model), out(loaded(folders["larger"])))


def test_configs_of_the_caller_say_the_new_rank() -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 4})
    model = get_peft_model(models.make("llama"), config)
    prepare_model_for_compiled_hotswap(model, target_rank=4, config=config)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (4, 12, {})
    other = LoraConfig(r=2, lora_alpha=6, use_rslora=True)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config={"x": other})
    assert (other.r, other.lora_alpha) == (8, 12)


# Refusals


def refused(model: Any, message: str, folder: Path, name: str = "default") -> None:
    before = snapshot(model)
    with pytest.raises(UsageError, match=message):
        hotswap_adapter(model, folder, name)
    assert_same(before, snapshot(model))


def test_what_does_not_fit_is_refused_and_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    model = loaded(folders["same"])
    refused(model, "no adapter 'x'", folders["same"], "x")
    refused(model, r"rank 8 on .* room for 4.*target_rank=8", folders["larger"])
    refused(model, "is on .*down_proj, where 'default' is not", folders["other"])
    for number, fields in enumerate(
        ({"lora_bias": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]})
    ):
        folder = tmp_path / str(number)
        get_peft_model(models.make("llama"), LoraConfig(**CONFIGS["same"], **fields)).save_pretrained(folder)
        refused(model, "of another kind|other whole modules", folder)
    model.merge_adapter()
    refused(model, "merged", folders["same"])


def test_what_cannot_be_prepared(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="has no adapters"):
        prepare_model_for_compiled_hotswap(models.make("llama"))
    model = loaded(folders["same"])
    with pytest.raises(UsageError, match=r"rank 4 .* above target_rank=3"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    dora = get_peft_model(models.make("llama"), LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="only plain LoRA"):
        prepare_model_for_compiled_hotswap(dora)


@pytest.mark.parametrize("check", ["error", "warn", "ignore", "maybe"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_is_compiled_already(check: Any, in_place: bool, folders: dict[str, Path]) -> None:
    model: nn.Module = loaded(folders["same"])
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    if check == "error":
        with pytest.raises(UsageError, match=r"before torch\.compile"):
            prepare_model_for_compiled_hotswap(model)
    elif check == "warn":
        with pytest.warns(UserWarning, match=r"before torch\.compile"):
            prepare_model_for_compiled_hotswap(model, check_compiled=check)
    elif check == "ignore":
        prepare_model_for_compiled_hotswap(model, check_compiled=check)
    else:
        with pytest.raises(UsageError, match="'error', 'warn' or 'ignore', not 'maybe'"):
            prepare_model_for_compiled_hotswap(model, check_compiled=check)
