"""Resized adapters, against the dense SVD and PEFT's reading of the new file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.making import Q0, best, close, config_of, peft_updates_in, reconfigure, saved, updates_in
from veneer import AdapterFileError, UsageError
from veneer.adapters import files
from veneer.adapters.derived import write
from veneer.adapters.resize import resize
from veneer.core.records import ApproximatedLayer

WEIGHTS = "adapter_model.safetensors"
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 6, "0.self_attn.v_proj": 2}, "alpha_pattern": {"k_proj": 1}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def resized(folder: Path, output: Path, rank: float) -> tuple[ApproximatedLayer, ...]:
    new, report = resize(files.read(folder), rank)
    write(output, new, figures={})
    return report


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("r", [1, 3, 4, 9])
def test_every_layer_is_the_best_of_its_rank(config: dict[str, Any], r: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", **config)
    before = updates_in(folder)
    report = resized(folder, tmp_path / "b", r)
    close(updates_in(tmp_path / "b"), {path: best(update, r) for path, update in before.items()})
    close(peft_updates_in(tmp_path / "b"), updates_in(tmp_path / "b"))
    assert {layer.path: layer.r for layer in report} == dict.fromkeys(before, r)
    for layer in report:
        update = before[layer.path]
        missed = float((update - best(update, r)).norm() / update.norm())
        assert layer.norm == pytest.approx(float(update.norm()), rel=1e-6)
        assert layer.error == pytest.approx(missed, abs=1e-6)
        assert layer.kept == pytest.approx(1 - missed**2, abs=1e-6)
    written = config_of(tmp_path / "b")
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (r, r, False)
    assert written["rank_pattern"] == written["alpha_pattern"] == {}


@pytest.mark.parametrize("share", [0.3, 0.8, 0.95, 1.0])
def test_the_smallest_rank_that_keeps_a_share(share: float, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", **CONFIGS["patterns"])
    before = updates_in(folder)
    report = resized(folder, tmp_path / "b", share)
    for layer in report:
        S = torch.linalg.svdvals(before[layer.path])
        kept = (S.square().cumsum(0) / S.square().sum()).tolist()
        assert layer.r == next(r for r, sum_ in enumerate(kept, start=1) if sum_ >= share - 1e-9)
    close(updates_in(tmp_path / "b"), {layer.path: best(before[layer.path], layer.r) for layer in report})
    # The trap: a rank_pattern without the alphas that go with it would scale these layers by another factor.
    close(peft_updates_in(tmp_path / "b"), updates_in(tmp_path / "b"))
    written = config_of(tmp_path / "b")
    assert written["rank_pattern"] == written["alpha_pattern"]
    assert share == 0.3 or len({layer.r for layer in report}) > 1


def test_what_is_beside_the_factors_comes_along(tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "a", "opt", target_modules=["q_proj", "fc1"], lora_bias=True, bias="all", modules_to_save=["lm_head"]
    )
    before = files.read(folder)
    resized(folder, tmp_path / "b", 2)
    after = files.read(tmp_path / "b")
    assert after.metadata == before.metadata
    for key, tensor in before.tensors.items():
        if "lora_B.bias" in key:
            torch.testing.assert_close(after.tensors[key], tensor * 1.5)
        elif "lora_" not in key:
            assert torch.equal(after.tensors[key], tensor)
    mine, source = config_of(tmp_path / "b"), config_of(folder)
    for field in ("bias", "lora_bias", "modules_to_save", "target_modules", "base_model_name_or_path", "task_type"):
        assert mine[field] == source[field]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_its_rounding_is_in_the_error(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    narrow = {key: tensor.to(dtype) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(narrow, folder / WEIGHTS)
    report = resized(folder, tmp_path / "b", 4)
    assert {tensor.dtype for tensor in load_file(tmp_path / "b" / WEIGHTS).values()} == {dtype}
    before, after = updates_in(folder), updates_in(tmp_path / "b")
    for layer in report:
        missed = float((after[layer.path] - before[layer.path]).norm() / before[layer.path].norm())
        assert layer.error == pytest.approx(missed, rel=1e-3)
        assert 0 < layer.error < 4 * torch.finfo(dtype).eps
        assert layer.kept == pytest.approx(1)


@pytest.mark.parametrize("r", [2, 8, 16])
def test_a_start_that_took_a_part_of_the_weight(r: int, tmp_path: Path) -> None:
    """The file holds what it took, so the update of the original base is known without it."""
    folder = saved(tmp_path / "a", init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    before = updates_in(folder)
    resized(folder, tmp_path / "b", r)
    close(peft_updates_in(tmp_path / "b"), {path: best(update, r) for path, update in before.items()}, relative=1e-5)
    assert config_of(tmp_path / "b")["init_lora_weights"] is True


def test_what_it_is_beside_its_factors_stays(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", trainable_token_indices=[3, 4], alora_invocation_tokens=[5])
    resized(folder, tmp_path / "b", 2)
    mine, source = config_of(tmp_path / "b"), config_of(folder)
    for field in ("trainable_token_indices", "alora_invocation_tokens"):
        assert mine[field] == source[field]
    after, before = files.read(tmp_path / "b").tensors, files.read(folder).tensors
    [rows] = [key for key in before if "trainable_tokens" in key]
    assert torch.equal(after[rows], before[rows])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"use_dora": True}, "type LORA with use_dora, whose update is no product of two factors"),
        ({"use_qalora": True, "qalora_group_size": 4}, "type LORA with use_qalora"),
        ({"init_lora_weights": "loftq"}, "started from a part of the base's weights"),
    ],
)
def test_what_is_no_plain_lora(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", **{"target_modules": ["down_proj"], **config})
    with pytest.raises(UsageError, match=sentence):
        resize(files.read(folder), 2)


def test_pefts_own_file_of_such_a_start(tmp_path: Path) -> None:
    import peft

    from tests import models

    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"])
    peft.get_peft_model(models.make("llama"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(UsageError, match=r"init_lora_weights='pissa'.*veneer convert"):
        resize(files.read(tmp_path / "a"), 2)


def test_an_untrained_adapter(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    zeros = {k: t.zero_() if "lora_B" in k else t for k, t in load_file(folder / WEIGHTS).items()}
    save_file(zeros, folder / WEIGHTS)
    report = resized(folder, tmp_path / "b", 0.9)
    assert {(layer.r, layer.norm, layer.kept, layer.error) for layer in report} == {(1, 0.0, 1.0, 0.0)}
    assert not any(update.any() for update in updates_in(tmp_path / "b").values())


def test_a_path_that_another_one_ends_in(tmp_path: Path) -> None:
    """The patterns of a file are endings: "0" would also be the rank of "inner.0"."""
    from veneer import LoraConfig, PeftModel, get_peft_model

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        inner = torch.nn.Sequential(torch.nn.Linear(6, 6))
        outer = torch.nn.Sequential(torch.nn.Linear(6, 6))
        outer.add_module("inner", inner)
        return outer

    adapted = get_peft_model(model(), LoraConfig(r=3, target_modules=["0"], rank_pattern={"^0": 1}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "a")
    layers = {"0": 1, "inner.0": 3}
    assert {path: layer.r["default"] for path, layer in adapted.base_model.layers.items()} == layers
    resized(tmp_path / "a", tmp_path / "b", 1.0)
    again = PeftModel.from_pretrained(model(), tmp_path / "b")
    assert {path: layer.r["default"] for path, layer in again.base_model.layers.items()} == layers


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"r": 3}, AdapterFileError, "expected two matrices of rank 3"),
        ({"rank_pattern": {"q_proj": 5}}, AdapterFileError, "expected two matrices of rank 5"),
    ],
)
def test_files_that_do_not_fit_their_config(
    fields: dict[str, Any], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "a")
    reconfigure(folder, **fields)
    with pytest.raises(error, match=sentence):
        resize(files.read(folder), 2)


def test_half_a_pair_and_none(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    del tensors[f"base_model.model.{Q0}.lora_B.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"q_proj.lora_A.weight but no .*q_proj.lora_B.weight"):
        resize(files.read(folder), 2)
    save_file({"x": torch.ones(1)}, folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match="no pair of factors"):
        resize(files.read(folder), 2)


def test_no_rank(tmp_path: Path) -> None:
    read = files.read(saved(tmp_path / "a"))
    for rank in (0, -2, 1.5, math.nan):
        with pytest.raises(UsageError, match="The rank is"):
            resize(read, rank)
