"""VeRA against PEFT: the same pair from the same seed, outputs, gradients, files; and files without the pair."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from tests import models
from veneer import AdapterFileError, ConfigError, PeftConfig, VeraConfig

F64 = torch.float64
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "k_proj", "down_proj"], "r": 5}),
    "llama-regex": ("llama", {"target_modules": r".*1.*up_proj", "r": 300, "projection_prng_key": 7}),
    "llama-all-linear": ("llama", {"target_modules": "all-linear", "r": 4}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "r": 5, "fan_in_fan_out": True}),
    "opt-bias": ("opt", {"target_modules": ["q_proj", "fc1"], "r": 5, "bias": "vera_only"}),
    "opt-bias-all": ("opt", {"target_modules": ["q_proj"], "r": 5, "bias": "all"}),
    "bert-head": ("bert", {"target_modules": ["query"], "r": 5, "task_type": "SEQ_CLS"}),
    "random": ("llama", {"target_modules": ["q_proj"], "r": 5, "init_weights": False}),
    "unsaved": ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 5, "save_projection": False}),
}
everywhere = pytest.mark.parametrize("case", CASES)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=F64)
                # Not added to: d_initial is rounded to float32 there, and not here.
                parameter.copy_(noise if "vera_lambda" in name else parameter + noise)


def both(case: str) -> tuple[peft.PeftModel, veneer.PeftModel]:
    kind, fields = CASES[case]
    made = []
    for library in (peft, veneer):
        with warnings.catch_warnings():
            # Remarks on save_projection=False, which the tests below are about.
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            # PEFT leaves the vectors in float32 beside a float64 base.
            made.append(library.get_peft_model(models.make(kind, dtype=F64), library.VeraConfig(**fields)).double())
        move(made[-1])
    return made[0].eval(), made[1].eval()


def gradients(model: nn.Module, kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = models.output(model, models.batch(kind, dtype=F64))
    (out * torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@everywhere
def test_pair_outputs_gradients_files_and_merged_weights_are_pefts(case: str, tmp_path: Path) -> None:
    kind = CASES[case][0]
    theirs, ours = both(case)
    # The very same draw, whoever makes it.
    for key in ("vera_A", "vera_B"):
        assert torch.equal(getattr(ours.base_model, key).default, getattr(theirs.base_model, key)["default"])
    if case != "random":
        (a, a_grads), (b, b_grads) = gradients(theirs, kind), gradients(ours, kind)
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        assert a_grads.keys() == b_grads.keys()
        for name, gradient in a_grads.items():
            torch.testing.assert_close(b_grads[name], gradient, rtol=1e-9, atol=1e-9)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nor a checksum.*")
        loaded = veneer.PeftModel.from_pretrained(models.make(kind, dtype=F64), tmp_path / "theirs")
    loaded.save_pretrained(tmp_path / "ours")
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    a = {k: v for k, v in a.items() if ".original_module." not in k and ".modules_to_save." not in k}
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert ("base_model.vera_A" in a) == (case != "unsaved")
    inputs = models.batch(kind, dtype=F64)
    expected = models.output(theirs, inputs)
    torch.testing.assert_close(models.output(loaded, inputs), expected, rtol=1e-9, atol=1e-9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*to not (load|save) vera_A.*")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        back = peft.PeftModel.from_pretrained(models.make(kind, dtype=F64), str(tmp_path / "ours"))
        back = back.double().eval()
    torch.testing.assert_close(models.output(back, inputs), expected, rtol=1e-9, atol=1e-9)
    a, b = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    named = {"target_modules", "modules_to_save"}
    assert {k: v for k, v in a.items() if k not in named} == {k: v for k, v in b.items() if k not in named}
    merged, right = loaded.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    for key, tensor in right.items():
        torch.testing.assert_close(merged[key], tensor, rtol=1e-12, atol=1e-12)


@everywhere
def test_a_fresh_adapter_trains_what_pefts_does(case: str) -> None:
    theirs, ours = both(case)
    shapes = [{n: p.shape for n, p in model.named_parameters() if p.requires_grad} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_pair_beside_a_half_precision_base_is_pefts(dtype: torch.dtype) -> None:
    fields = {"target_modules": ["q_proj"], "r": 5}
    ours = veneer.get_peft_model(models.make("llama", dtype=dtype), VeraConfig(**fields))
    theirs = peft.get_peft_model(models.make("llama", dtype=dtype), peft.VeraConfig(**fields))
    assert torch.equal(ours.base_model.vera_A.default.float(), theirs.base_model.vera_A["default"].float())
    assert ours.base_model.vera_A.default.dtype == torch.float32


def test_dropout_is_pefts() -> None:
    fields = {"target_modules": ["q_proj", "down_proj"], "r": 5, "vera_dropout": 0.4}
    outs = []
    for library in (peft, veneer):
        model = library.get_peft_model(models.make("llama", dtype=F64), library.VeraConfig(**fields)).double().train()
        move(model)
        torch.manual_seed(0)
        outs.append(models.output(model, models.batch("llama")))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-9, atol=1e-9)


def unsaved(folder: Path) -> torch.Tensor:
    """A folder with an adapter whose pair is not in the file; its outputs."""
    _, ours = both("unsaved")
    ours.save_pretrained(folder)
    return models.output(ours, models.batch("llama"))


def load(folder: Path) -> veneer.PeftModel:
    return veneer.PeftModel.from_pretrained(models.make("llama", dtype=F64), folder)


def test_without_the_pair_in_the_file_it_is_drawn_again_and_checked(tmp_path: Path) -> None:
    expected = unsaved(tmp_path)
    # No warning: the checksum says that it is the same pair.
    torch.testing.assert_close(models.output(load(tmp_path), models.batch("llama")), expected, rtol=0, atol=0)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "shared_checksum": "0" * 64})
    with pytest.raises(AdapterFileError, match="this machine draws others from their seed"):
        load(tmp_path)
    del metadata["shared_checksum"]
    save_file(load_file(path), path, metadata)
    with pytest.warns(UserWarning, match="nor a checksum"):
        load(tmp_path)


def test_a_pair_in_the_file_is_taken_also_where_the_config_would_draw_one(tmp_path: Path) -> None:
    unsaved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    # Larger than this model needs: PEFT's second adapter shares the pair of the first.
    A, B = torch.randn(5, 40, dtype=F64), torch.randn(50, 5, dtype=F64)
    save_file({**tensors, "base_model.vera_A": A, "base_model.vera_B": B}, path)
    model = load(tmp_path)
    assert torch.equal(model.base_model.vera_A.default, A)
    save_file({**tensors, "base_model.vera_A": A[:, :3].contiguous(), "base_model.vera_B": B}, path)
    with pytest.raises(AdapterFileError, match="vera_A has shape"):
        load(tmp_path)


def test_a_missing_pair_is_named(tmp_path: Path) -> None:
    _, ours = both("llama")
    ours.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "vera_B" not in k}, path)
    with pytest.raises(AdapterFileError, match=r"base_model\.vera_B is missing"):
        load(tmp_path)


def test_adapters_of_several_seeds_and_ranks_live_side_by_side() -> None:
    """PEFT lets all adapters of a model share the first one's pair."""
    model = veneer.get_peft_model(models.make("llama"), VeraConfig(r=5, target_modules=["q_proj"]), "one")
    model.add_adapter("two", VeraConfig(r=9, target_modules=["down_proj"], projection_prng_key=3))
    shared = model.base_model
    assert shared.vera_A.one.shape == (5, models.D)
    assert shared.vera_A.two.shape == (9, models.F)
    model.set_adapter("two")
    model.delete_adapter("one")
    assert not hasattr(shared.vera_A, "one")


@pytest.mark.parametrize("module", [nn.Embedding(5, 4), nn.Conv2d(3, 4, 3)], ids=lambda m: type(m).__name__)
def test_layers_that_are_not_linear_are_refused(module: nn.Module) -> None:
    with pytest.raises(ConfigError, match=f"VeRA has no meaning on {type(module).__name__}"):
        veneer.get_peft_model(nn.Sequential(module), VeraConfig(r=2, target_modules=["0"]))


GOOD = [
    *[("r", 1), ("projection_prng_key", 5), ("save_projection", False), ("vera_dropout", 0.5), ("d_initial", 1)],
    *[("d_initial", 0), ("init_weights", False), ("layers_to_transform", [0])],
    *[("bias", value) for value in ("none", "all", "vera_only")],
]
BAD = [
    *[("r", 0), ("projection_prng_key", -1), ("projection_prng_key", "a"), ("save_projection", 1), ("vera_dropout", 1)],
    *[("d_initial", "x"), ("d_initial", -1), ("init_weights", "pissa"), ("bias", "lora_only")],
    *[("exclude_modules", ["a"]), ("lora_alpha", 3), ("rank_pattern", {"q": 3})],
]


@pytest.mark.parametrize(("name", "value"), GOOD, ids=str)
def test_accepted_values_survive_the_file(name: str, value: Any) -> None:
    config = VeraConfig(target_modules=["q"], **{name: value})
    again = PeftConfig.from_dict(json.loads(config.to_json()), source="file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.VeraConfig(target_modules=["q"], **{name: value})
    assert getattr(again, name) == value == getattr(theirs, name)


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_refused_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        VeraConfig(**{name: value})


def test_fields_and_defaults_are_pefts() -> None:
    a, b = peft.VeraConfig().to_dict(), VeraConfig().to_dict()
    skipped = {"peft_type", "peft_version", "runtime_config"}
    assert {k: v for k, v in a.items() if k not in skipped} == {k: v for k, v in b.items() if k not in skipped}
    assert {f.name for f in dataclasses.fields(VeraConfig)} - {"exclude_modules"} == set(a) - {"runtime_config"}
