"""The updates of a file and of a model against the dense change of every layer, for every variant on every base."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import models
from tests.adapters import making
from tests.contract.test_contract import VARIANTS, adapt, base_model, combinations, config
from veneer import LoraConfig, MergeError, PeftModel, UsageError, get_peft_model
from veneer.adapters import files
from veneer.adapters.lowrank import spectrum_of
from veneer.adapters.updates import LayerUpdate, updates_in_file, updates_on_model

Q0 = making.Q0


def dense(update: LayerUpdate) -> Tensor:
    spectrum = update.spectrum()
    left, right = spectrum.vectors(len(spectrum.values))
    return left * spectrum.values @ right


def close(found: Tensor, wanted: Tensor, relative: float = 1e-6) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= relative * float(wanted.norm())


@combinations
def test_on_its_model_every_update_is_the_change_of_the_weight(
    variant: str, base: str, case: str, tmp_path: Path
) -> None:
    model, _, _ = base_model(base, case, torch.float32)
    adapted = adapt(model, config(variant), "default")
    models.randomise(adapted)
    found = {update.path: update for update in updates_on_model(adapted.base_model, "default")}
    assert found.keys() == adapted.base_model.layers.keys()
    wanted: dict[str, Tensor] = {}
    for path, update in found.items():
        layer = adapted.base_model.layers[path]
        assert update.whole
        assert update.weight_norm == pytest.approx(float(layer.original.weight().norm()), rel=1e-4)
        try:
            with torch.no_grad():
                wanted[path] = layer.change("default").double()
        except MergeError:
            # Applied and not merged: there is no change to compare with, and the factors tell all the same.
            assert len(update.spectrum().values)
            return
        close(dense(update), wanted[path])
        assert update.shape == tuple(wanted[path].shape)
    adapted.save_pretrained(tmp_path)
    with contextlib.suppress(UsageError):
        # Refused for variants whose files tell no update; what is told is right.
        for alone in updates_in_file(files.read(tmp_path)):
            assert alone.path in found
            if alone.whole:
                close(dense(alone), wanted[alone.path])
                assert (alone.shape, alone.r) == (found[alone.path].shape, found[alone.path].r)
                assert alone.scaling == pytest.approx(found[alone.path].scaling)


def test_which_files_tell_their_updates(tmp_path: Path) -> None:
    """Of each variant it is known whether its file alone tells its updates; a new one must be thought about."""
    told = {}
    for variant in VARIANTS:
        model, _, _ = base_model("linear", "no-bias", torch.float32)
        plain = get_peft_model(model, config("lora" if variant == "alora" else variant))
        plain.save_pretrained(tmp_path / variant)
        read = files.read(tmp_path / variant)
        if variant == "alora":
            # It cannot be put on a model without token ids; its file has the tensors of LoRA's.
            read = replace(read, config=config(variant))
        try:
            told[variant] = {update.whole for update in updates_in_file(read)}
        except UsageError as refusal:
            told[variant] = str(refusal)
    whole = {variant for variant, answer in told.items() if answer == {True}}
    part = {variant for variant, answer in told.items() if answer == {False}}
    assert (whole, part) == ({"lora", "alora", "adalora"} & set(VARIANTS), {"dora"} & set(VARIANTS))
    for variant in set(VARIANTS) - whole - part:
        assert "name the base model (--model)" in told[variant]


@pytest.mark.parametrize("kind", models.MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {r".*\.0\..*": 2}},
        {"alpha_pattern": {r".*\.1\..*": 3}, "r": 3},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_a_file_tells_its_updates(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = making.adapted(kind, **options)
    model.save_pretrained(tmp_path)
    wanted = making.updates(model)
    found = updates_in_file(files.read(tmp_path))
    assert {update.path for update in found} == wanted.keys()
    for update in found:
        close(dense(update), wanted[update.path])
        values = update.spectrum().values[: update.r].numpy()
        assert values == pytest.approx(np.linalg.svd(wanted[update.path].numpy(), compute_uv=False)[: len(values)])
        assert update.whole
        assert update.weight_norm is None


@pytest.mark.parametrize(
    "start", ["kaiming", "gaussian", "random", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica"]
)
def test_an_adapter_that_stands_on_another_weight(tmp_path: Path, start: str) -> None:
    value = {"kaiming": True, "random": False}.get(start, start)
    model = making.adapted(init_lora_weights=value, target_modules=["q_proj"])
    wanted = making.updates(model)
    for update in updates_on_model(model.base_model, "default"):
        assert update.whole
        close(dense(update), wanted[update.path])
    model.save_pretrained(tmp_path)
    told = updates_in_file(files.read(tmp_path))
    for update in told:
        if update.whole:
            close(dense(update), wanted[update.path])
    moves = start.startswith("pissa") or start == "olora"
    assert moves or all(update.whole for update in told)


def test_layers_stand_in_the_models_order(tmp_path: Path) -> None:
    making.saved(tmp_path, target_modules=["q_proj"])
    read = files.read(tmp_path)
    tensors = {}
    for key, tensor in read.tensors.items():
        for number in ("0", "2", "10"):
            tensors[key.replace("layers.0", f"layers.{number}")] = tensor
    many = files.AdapterFiles(read.source, read.config, dict(sorted(tensors.items())), {})
    numbers = [update.path.split(".")[2] for update in updates_in_file(many)]
    assert numbers == ["0", "1", "2", "10"]


def test_what_needs_the_weight_is_told_in_part(tmp_path: Path) -> None:
    model = making.adapted(use_dora=True, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    tensors = {path: layer.tensors("default") for path, layer in model.base_model.layers.items()}
    for update in updates_in_file(files.read(tmp_path)):
        assert not update.whole
        A, B = (tensors[update.path][f"lora_{which}.weight"].detach().double() for which in "AB")
        close(dense(update), update.scaling * B @ A)
    for update in updates_on_model(model.base_model, "default"):
        assert update.whole
        close(dense(update), making.updates(model)[update.path])


def test_a_convolution_in_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2, bias=False))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))
    models.randomise(adapted)
    adapted.save_pretrained(tmp_path)
    (update,) = updates_in_file(files.read(tmp_path))
    # The change as a matrix over all inputs of a patch: what a single patch, which the kernel covers, is multiplied by.
    patches = torch.eye(4 * 9).reshape(-1, 4, 3, 3)
    with torch.no_grad():
        wanted = (adapted(patches) - model[0].base_layer(patches)).flatten(1).T.double()
    close(dense(update), wanted)
    (on_model,) = updates_on_model(adapted.base_model, "default")
    assert on_model.shape == update.shape == (6, 36)


def test_a_file_without_factors(tmp_path: Path) -> None:
    making.saved(tmp_path)
    read = files.read(tmp_path)
    other = files.AdapterFiles("here", read.config, {"base_model.model.a.ia3_l": torch.ones(3)}, {})
    with pytest.raises(UsageError, match=r"no products of two factors in the file; name the base model \(--model\)"):
        updates_in_file(other)
    half = {key: tensor for key, tensor in read.tensors.items() if "lora_A" in key}
    with pytest.raises(UsageError, match=r"are no two factors of rank 4"):
        updates_in_file(files.AdapterFiles("here", read.config, half, {}))


def test_parameters_are_not_named_in_the_file(tmp_path: Path) -> None:
    making.saved(tmp_path)
    read = files.read(tmp_path)
    other = replace(read, config=LoraConfig(target_parameters=["mlp.weight"]))
    with pytest.raises(UsageError, match=r"adapts parameters \(mlp.weight\).*name the base model \(--model\)"):
        updates_in_file(other)


def test_an_unknown_adapter(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(models.make("llama"), making.saved(tmp_path))
    with pytest.raises(UsageError, match="no adapter 'x'"):
        list(updates_on_model(model.base_model, "x"))


def test_a_dense_update_is_decomposed_whole() -> None:
    model = making.adapted(use_dora=True, target_modules=["q_proj"])
    first = next(updates_on_model(model.base_model, "default"))
    wanted = spectrum_of(making.updates(model)[first.path]).values
    torch.testing.assert_close(first.spectrum().values, wanted)
