"""Combined adapters, against PEFT where PEFT is right and against sums of dense updates everywhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import AdaLoraConfig, LoraConfig, PeftModel, UsageError, VeraConfig, get_peft_model
from veneer.adapters import arithmetic, files
from veneer.adapters.arithmetic import TYPES

WEIGHTS = [0.7, -1.2, 0.4]
ATTENTION = ["q_proj", "v_proj"]
PRUNING = {kind for kind in TYPES if kind.startswith(("ties", "dare", "magnitude"))}


def made(kind: str, *configs: dict[str, Any]) -> PeftModel:
    """A model with adapters "a", "b", ... that all change the outputs."""
    model: PeftModel | None = None
    for number, config in enumerate(configs):
        name, full = "abc"[number], LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ATTENTION, **config})
        if model is None:
            model = get_peft_model(models.make(kind), full, name)
        else:
            model.add_adapter(name, full)
        models.randomise(model, seed=number + 1, adapter=name)
    assert model is not None
    return model


def updates(model: PeftModel, name: str) -> dict[str, Tensor]:
    with torch.no_grad():
        return {path: layer.change(name).double() for path, layer in model.base_model.layers_of(name).items()}


def expected(model: PeftModel, names: str = "abc", weights: list[float] = WEIGHTS) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for name, weight in zip(names, weights, strict=False):
        for path, update in updates(model, name).items():
            total[path] = total.get(path, 0) + weight * update
    return total


def assert_updates(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for path, update in wanted.items():
        torch.testing.assert_close(found[path], update, rtol=0, atol=2e-6 * float(update.abs().max()), msg=path)


def theirs(model: PeftModel, folder: Path, kind: str) -> peft.PeftModel:
    """The same adapters on the same base, in PEFT."""
    model.save_pretrained(folder)
    names = list(model.peft_config)
    other = peft.PeftModel.from_pretrained(models.make(kind), folder / names[0], names[0])
    for name in names[1:]:
        other.load_adapter(folder / name, name)
    return other


def factors(model: Any, name: str) -> dict[str, Tensor]:
    marks = (f".lora_A.{name}.", f".lora_B.{name}.", f".lora_embedding_A.{name}", f".lora_embedding_B.{name}")
    return {k: p.detach() for k, p in model.named_parameters() if any(mark in f"{k}" for mark in marks)}


def density_for(kind: str) -> float | None:
    return 0.6 if kind in PRUNING else None


# Against PEFT


LOSSY = pytest.mark.filterwarnings("ignore:At the rank of its adapters")


@LOSSY
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("combination", [kind for kind in TYPES if "dare" not in kind])
@pytest.mark.parametrize("model_kind", ["llama", "gpt2"])
def test_the_tensors_are_pefts(model_kind: str, combination: str, majority: str, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "embed_tokens"] if model_kind == "llama" else ["c_attn", "c_fc", "wte"]
    configs = [{"target_modules": targets, "lora_alpha": alpha} for alpha in (3, 6, 9)]
    with pytest.warns(UserWarning, match="does not reach") if model_kind == "gpt2" else _nothing():
        model = made(model_kind, *configs)
        other = theirs(model, tmp_path, model_kind)
    density = density_for(combination)
    options: dict[str, Any] = {"density": density} if density else {}
    if "ties" in combination:
        options["majority_sign_method"] = majority
    other.add_weighted_adapter(["a", "b", "c"], WEIGHTS, "new", combination, **options)
    model.add_weighted_adapter(["a", "b", "c"], WEIGHTS, "new", combination, **options)
    mine, wanted = factors(model, "new"), factors(other, "new")
    assert mine.keys() == wanted.keys()
    if not combination.endswith("svd"):
        for key, tensor in wanted.items():
            torch.testing.assert_close(mine[key], tensor)
    for path, layer in model.base_model.layers.items():
        delta = other.base_model.model.get_submodule(path).get_delta_weight("new")
        delta = delta if tuple(delta.shape) == layer.base.shape() else delta.T
        torch.testing.assert_close(layer.change("new"), delta, rtol=0, atol=3e-6 * float(delta.abs().max()))
    assert model.peft_config["new"].r == other.peft_config["new"].r
    assert model.peft_config["new"].lora_alpha == other.peft_config["new"].lora_alpha


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("clamp", [0.6, 0.9, 1.0])
def test_clamping_is_pefts(clamp: float, tmp_path: Path) -> None:
    model = made("llama", {}, {})
    other = theirs(model, tmp_path, "llama")
    for each in (model, other):
        each.add_weighted_adapter(["a", "b"], [1.0, 0.5], "new", "svd", svd_rank=2, svd_clamp=clamp)
    for path, layer in model.base_model.layers.items():
        torch.testing.assert_close(
            layer.change("new"),
            other.base_model.model.get_submodule(path).get_delta_weight("new"),
            rtol=1e-4,
            atol=1e-5,
        )


@LOSSY
@pytest.mark.parametrize("combination", [kind for kind in TYPES if "dare" in kind])
def test_what_is_drawn_comes_from_torchs_generator(combination: str) -> None:
    model = made("llama", {}, {})
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        torch.manual_seed(seed)
        model.add_weighted_adapter(["a", "b"], [1.0, 0.5], name, combination, density=0.5)
    one, same, other = (factors(model, name) for name in ("one", "same", "other"))
    assert all(torch.equal(a, b) for a, b in zip(one.values(), same.values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_on_updates_is_pefts_function_on_them(method: str) -> None:
    model = made("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0]}, {"target_modules": ["q_proj"]})
    path = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.layers[path]
    tensors = [layer.change(name).detach() for name in ("a", "b")]
    torch.manual_seed(3)
    wanted = getattr(peft.utils.merge_utils, method)(tensors, torch.tensor([0.5, 2.0]), density=0.5)
    torch.manual_seed(3)
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "new", f"{method}_svd", svd_rank=16, density=0.5)
    torch.testing.assert_close(layer.change("new"), wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


# Against the sum of the updates


MIXED = [
    {"use_rslora": True, "r": 4, "lora_alpha": 3},
    {"r": 2, "lora_alpha": 10, "target_modules": ["v_proj", "down_proj"]},
    {"r": 2, "rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.v_proj": 1}},
]


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_the_sum_is_exact_whatever_the_ranks_and_scalings(combination: str) -> None:
    model = made("llama", *MIXED)
    rank = {"svd_rank": 11} if combination == "svd" else {}
    report = model.add_weighted_adapter(["a", "b", "c"], WEIGHTS, "new", combination, **rank)
    assert_updates(updates(model, "new"), expected(model))
    assert {layer.path for layer in report} == set(updates(model, "new"))
    assert max(layer.error for layer in report) < 1e-7
    if combination == "cat":
        assert {layer.path.removeprefix("model.layers."): layer.r for layer in report} == {
            "0.self_attn.q_proj": 4 + 5,
            "1.self_attn.q_proj": 4 + 2,
            "0.self_attn.v_proj": 4 + 2 + 2,
            "1.self_attn.v_proj": 4 + 2 + 2,
            "0.mlp.down_proj": 2,
            "1.mlp.down_proj": 2,
        }


def test_a_truncated_sum_is_the_best_of_its_rank_and_says_what_it_keeps() -> None:
    model = made("llama", *MIXED)
    report = {
        layer.path: layer for layer in model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "svd", svd_rank=2)
    }
    for path, update in expected(model, "ab", [1.0, 1.0]).items():
        U, S, Vt = torch.linalg.svd(update)
        torch.testing.assert_close(updates(model, "new")[path], (U[:, :2] * S[:2]) @ Vt[:2], rtol=0, atol=1e-6)
        kept = float(S[:2].square().sum() / S.square().sum())
        assert report[path].kept == pytest.approx(kept, abs=1e-6)
        assert report[path].error == pytest.approx(math.sqrt(1 - kept), abs=1e-6)
        assert report[path].norm == pytest.approx(float(update.norm()), rel=1e-6)
    # By default the rank is the largest of those on the layer.
    report = {layer.path: layer for layer in model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "more", "svd")}
    assert report["model.layers.0.self_attn.v_proj"].r == 4
    assert report["model.layers.0.mlp.down_proj"].r == 2


def test_a_rank_that_nobody_chose_says_what_it_loses() -> None:
    model = made("llama", {}, {})
    with pytest.warns(UserWarning, match=r"'svd' keeps \d\d\.\d% of the energy of what they are together"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "chosen", svd_rank=3)


def test_linear_adds_up_factors_and_not_updates() -> None:
    model = made("llama", {"lora_alpha": 3}, {"lora_alpha": 9})
    model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "new", "linear")
    layer = model.base_model.layers["model.layers.0.self_attn.q_proj"]
    A = {name: layer.lora_A[name].weight for name in ("a", "b", "new")}
    torch.testing.assert_close(A["new"], math.sqrt(0.5) * A["a"] - math.sqrt(6.0) * A["b"])
    assert not torch.allclose(layer.change("new"), 0.5 * layer.change("a") - 2 * layer.change("b"), atol=0.1)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if "ties" not in kind])
@pytest.mark.parametrize("weight", [1.0, -1.0, 0.25])
def test_one_adapter_is_weighted(kind: str, weight: float) -> None:
    model = made("llama", MIXED[0])
    model.add_weighted_adapter(["a"], [weight], "new", kind, density=1.0 if kind in PRUNING else None)
    assert_updates(updates(model, "new"), expected(model, "a", [weight]))


@LOSSY
@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "magnitude_prune", "magnitude_prune_svd"])
def test_biases_of_b(combination: str) -> None:
    model = made(
        "opt", {"lora_bias": True}, {"lora_bias": True, "lora_alpha": 1}, {"target_modules": ["q_proj", "fc1"]}
    )
    model.add_weighted_adapter(
        ["a", "b", "c"], WEIGHTS, "new", combination, density=1.0 if combination in PRUNING else None
    )
    for path, layer in model.base_model.layers_of("new").items():
        mine = layer.lora_B["new"].bias
        wanted = torch.zeros_like(mine)
        for name, weight in zip("abc", WEIGHTS, strict=True):
            if name in layer.specs and layer.lora_B[name].bias is not None:
                wanted += weight * layer.scaling[name] * layer.lora_B[name].bias
        torch.testing.assert_close(mine, wanted, msg=path)
        assert layer.scaling["new"] == 1


@pytest.mark.parametrize("kind", models.MODELS)
def test_every_family(kind: str) -> None:
    model = models.make(kind)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), "a")
    peft_model.add_adapter("b", LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True))
    for seed, name in enumerate("ab"):
        models.randomise(peft_model, seed=seed, adapter=name)
    given = models.batch(kind)
    peft_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    peft_model.set_adapter(["a", "b"])
    both = models.output(peft_model, given)
    peft_model.set_adapter("new")
    torch.testing.assert_close(models.output(peft_model, given), both, rtol=1e-4, atol=1e-5)


# One adapter with weight 1


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "lora_dropout": 0.1},
        {"lora_bias": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [5, 6]},
        {"use_qalora": True, "qalora_group_size": 4},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.v_proj": 1}},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "layers_to_transform": [1]},
    ],
    ids=lambda config: "-".join(config),
)
@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_one_adapter_with_weight_one_has_the_same_file(
    config: dict[str, Any], combination: str, tmp_path: Path
) -> None:
    kind = "opt" if "bias" in "".join(config) else "llama"
    model = made(kind, config)
    given = models.batch(kind)
    before = models.output(model, given)
    model.add_weighted_adapter(["a"], [1.0], "new", combination)
    model.save_pretrained(tmp_path)
    # Only the order of safetensors' metadata differs from file to file.
    mine, source = (files.read(tmp_path / name) for name in ("new", "a"))
    assert mine.tensors.keys() == source.tensors.keys()
    assert all(torch.equal(tensor, source.tensors[key]) for key, tensor in mine.tensors.items())
    assert (mine.metadata, mine.config) == (source.metadata, source.config)
    model.set_adapter("new")
    assert torch.equal(models.output(model, given), before)


@pytest.mark.parametrize("family", ["adalora", "adalora-pruned", "vera", "vera-drawn"])
def test_one_adapter_of_another_family_with_weight_one_has_the_same_file(family: str, tmp_path: Path) -> None:
    model = models.make("llama")
    if family.startswith("vera"):
        config: Any = VeraConfig(r=4, save_projection=family == "vera", target_modules=["q_proj", "v_proj"])
    else:
        config = AdaLoraConfig(init_r=4, target_r=2, total_step=6, tfinal=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, config, "a")
    models.randomise(model, seed=3, adapter="a")
    given = models.batch("llama")
    if family == "adalora-pruned":
        for step in range(1, 7):
            model(**given, labels=given["input_ids"]).loss.backward()
            model.base_model.update_and_allocate(step)
    before = models.output(model, given)
    model.add_weighted_adapter(["a"], [1.0], "new", "linear")
    model.save_pretrained(tmp_path)
    mine, source = (files.read(tmp_path / name) for name in ("new", "a"))
    assert mine.tensors.keys() == source.tensors.keys()
    assert all(torch.equal(tensor, source.tensors[key]) for key, tensor in mine.tensors.items())
    assert mine.config == source.config
    model.set_adapter("new")
    assert torch.equal(models.output(model, given), before)


# What is written


def test_the_file_says_what_the_factors_are(tmp_path: Path) -> None:
    model = made("llama", *MIXED)
    model.add_weighted_adapter(["a", "b", "c"], WEIGHTS, "new", "cat")
    given = models.batch("llama")
    model.set_adapter("new")
    before = models.output(model, given)
    model.save_pretrained(tmp_path)
    mine = PeftModel.from_pretrained(models.make("llama"), tmp_path / "new")
    other = peft.PeftModel.from_pretrained(models.make("llama"), tmp_path / "new")
    assert torch.equal(models.output(mine, given), before)
    torch.testing.assert_close(models.output(other, given), before, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "new" / "adapter_model.safetensors").items()}
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (9, 16)


def test_it_is_not_active_and_keeps_the_dtype() -> None:
    model = made("llama", {}, {})
    model.base_model.to(torch.bfloat16)
    before = models.output(model, models.batch("llama"))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    assert model.active_adapters == ["a"]
    assert torch.equal(models.output(model, models.batch("llama")), before)
    assert {tensor.dtype for tensor in factors(model, "new").values()} == {torch.bfloat16}
    assert not any(tensor.requires_grad for tensor in factors(model, "new").values())


def test_a_module_saved_whole_comes_along_as_it_is() -> None:
    config = {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}
    model = made("bert", config, {"target_modules": ["query", "value"]})
    with torch.no_grad():
        for key, value in model.base_model.biases.values("a").items():
            value += 0.1
            assert key.endswith("query.bias")
    model.add_weighted_adapter(["b", "a"], [0.5, 2.0], "new", "cat")
    wrapper = model.base_model.saved["classifier"]
    mine, source = wrapper.modules_to_save["new"].state_dict(), wrapper.modules_to_save["a"].state_dict()
    assert all(torch.equal(mine[key], source[key]) for key in source)
    biases, wanted = model.base_model.biases.values("new"), model.base_model.biases.values("a")
    assert all(torch.equal(biases[key], wanted[key]) for key in wanted)
    model.set_adapter("a")
    assert not torch.equal(wrapper.original_module.weight, wrapper.modules_to_save["a"].weight)


# Variants whose update is no product of two factors


def test_updates_of_dora_are_added_up() -> None:
    model = made("llama", {"use_dora": True}, {})
    report = model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "new", "svd", svd_rank=16)
    assert_updates(updates(model, "new"), expected(model, "ab", [1.0, -0.5]))
    assert max(layer.error for layer in report) < 1e-6


@pytest.mark.parametrize(("combination", "rank"), [("cat", None), ("svd", None), ("svd", 9)])
def test_starts_that_take_a_part_of_the_weight(combination: str, rank: int | None) -> None:
    model = made("llama", {"init_lora_weights": "pissa"}, {})
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "both", "cat")
    assert_updates(updates(model, "both"), expected(model, "ab", [0.5, 2.0]))
    model.add_weighted_adapter(["a"], [-0.5], "new", combination, svd_rank=rank)
    assert_updates(updates(model, "new"), expected(model, "a", [-0.5]))


@pytest.mark.parametrize("combination", ["linear", "cat"])
def test_factors_of_dora_are_not_its_update(combination: str) -> None:
    model = made("llama", {"use_dora": True}, {})
    before = snapshot(model)
    with pytest.raises(UsageError, match=r"'a' on .*q_proj' is no product of two factors"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", combination)
    assert_same(before, snapshot(model))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((["a", "x"], [1.0, 1.0], "new"), {}, "There is no adapter 'x'"),
        (([], [], "new"), {}, "expected a list of adapter names"),
        (("ab", [1.0, 1.0], "new"), {}, "expected a list of adapter names"),
        ((["a", "a"], [1.0, 1.0], "new"), {}, "named twice: a"),
        ((["a", "b"], [1.0], "new"), {}, "2 adapters and 1 weights"),
        ((["a", "b"], [1.0, float("nan")], "new"), {}, "A weight is nan"),
        ((["a", "b"], [1.0, True], "new"), {}, "A weight is True"),
        ((["a", "b"], [1.0, 1.0], "b"), {}, "already an adapter 'b'"),
        ((["a", "b"], [1.0, 1.0], "n.w"), {}, "cannot name an adapter"),
        ((["a", "b"], [1.0, 1.0], "new", "tiez"), {}, "Did you mean 'ties'"),
        ((["a"], [1.0], "new", "ties"), {"density": 0.5}, "only one adapter"),
        ((["a"], [1.0], "new", "dare_ties_svd"), {"density": 0.5}, "only one adapter"),
        ((["a", "b"], [1.0, 1.0], "new", "ties"), {}, "give density"),
        ((["a", "b"], [1.0, 1.0], "new", "ties"), {"density": 0.0}, "density is 0.0"),
        ((["a", "b"], [1.0, 1.0], "new", "ties"), {"density": 1.1}, "density is 1.1"),
        ((["a", "b"], [1.0, 1.0], "new", "svd"), {"density": 0.5}, "prunes nothing"),
        (
            (["a", "b"], [1.0, 1.0], "new", "ties"),
            {"density": 0.5, "majority_sign_method": "totl"},
            "Did you mean 'total'",
        ),
        ((["a", "b"], [1.0, 1.0], "new", "cat"), {"majority_sign_method": "frequency"}, "settles no signs"),
        ((["a", "b"], [1.0, 1.0], "new", "cat"), {"svd_rank": 2}, "svd_rank is given"),
        ((["a", "b"], [1.0, 1.0], "new", "linear"), {"svd_clamp": 0.9}, "svd_clamp is given"),
        ((["a", "b"], [1.0, 1.0], "new"), {"svd_rank": 0}, "The rank is 0"),
        ((["a", "b"], [1.0, 1.0], "new"), {"svd_rank": 0.5}, "svd_rank is 0.5"),
        ((["a", "b"], [1.0, 1.0], "new"), {"svd_clamp": 0.4}, "svd_clamp is 0.4"),
        ((["a", "b"], [1.0, 1.0], "new"), {"svd_driver": "magic"}, "svd_driver is 'magic'"),
        ((["a", "b"], [1.0, 1.0], "new"), {"svd_full_matrices": 1}, "svd_full_matrices is 1"),
        ((["a", "b"], [1.0, 1.0], "new", "linear"), {}, "needs equal ranks"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments: Any, options: dict[str, Any], sentence: str) -> None:
    model = made("llama", {}, {"r": 2})
    before = snapshot(model)
    with pytest.raises(UsageError, match=sentence):
        model.add_weighted_adapter(*arguments, **options)
    assert_same(before, snapshot(model))
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize(
    ("configs", "sentence"),
    [
        ([{"modules_to_save": ["lm_head"]}] * 2, "each have their own 'lm_head'"),
        ([{"bias": "all"}, {"bias": "lora_only"}], "each train the base's biases"),
    ],
)
def test_whole_modules_of_two_adapters(configs: list[dict[str, Any]], sentence: str) -> None:
    model = made("opt", *configs)
    before = snapshot(model)
    with pytest.raises(UsageError, match=sentence):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    assert_same(before, snapshot(model))


def test_starts_cannot_be_added_up_by_their_factors() -> None:
    model = made("llama", {"init_lora_weights": "pissa"}, {})
    with pytest.raises(UsageError, match="'a' started from a part of the weight"):
        model.add_weighted_adapter(["a"], [0.5], "new", "linear")


@LOSSY
@pytest.mark.parametrize("combination", TYPES)
def test_activated_adapters_stay_activated(combination: str) -> None:
    model = made("llama", {"alora_invocation_tokens": [5, 6]}, {"alora_invocation_tokens": [5, 6]}, {})
    model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "new", combination, density=density_for(combination))
    assert model.peft_config["new"].alora_invocation_tokens == [5, 6]
    if combination == "cat":
        given = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]])}
        model.set_adapter("new")
        after = models.output(model, given)
        with model.disable_adapter():
            before = models.output(model, given)
        assert torch.equal(after[:, :2], before[:, :2])
        assert not torch.allclose(after[:, 2:], before[:, 2:])
    with pytest.raises(UsageError, match="active from different tokens on"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "more", "cat")


def test_merged_adapters() -> None:
    model = made("llama", {}, {})
    model.merge_adapter(["b"])
    with pytest.raises(UsageError, match="b is merged into the weights; call unmerge_adapter"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")


def test_a_failure_at_the_end_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("opt", {"bias": "all", "modules_to_save": ["lm_head"]}, {})
    before = snapshot(model)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.nn.Linear, "load_state_dict", full)
    with pytest.raises(MemoryError):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", "cat")
    assert_same(before, snapshot(model))


def test_the_quantile_is_torchs() -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share in (0.001, 0.25, 0.5, 0.9137, 1.0):
        torch.testing.assert_close(arithmetic.quantile(values, share), torch.quantile(values, share))
