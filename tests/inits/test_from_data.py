"""Starts from data: CorDA, EVA and LoRA-GA against PEFT's own on the same batches, in both orders, from both files."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig as TheirCorda
from peft.tuners.lora.eva import get_eva_state_dict as their_eva
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

import veneer
from tests import models
from tests.inits.with_peft import TARGETS, compare
from veneer.adapters.index import EVIDENCE
from veneer.core.errors import AdapterFileError, ConfigError, UsageError

BATCHES = [models.batch("llama", seed=seed, rows=8) for seed in range(3)]
SINGLE = [models.batch("llama", seed=seed, rows=1) for seed in range(5)]


def fields(init: str, **more: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 8, "target_modules": TARGETS["llama"], "init_lora_weights": init, **more}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, labels=batch["input_ids"]).loss


def silent_peft(model: nn.Module, config: Any, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config, **more).eval()


# CorDA


@pytest.fixture
def their_preprocess(monkeypatch: pytest.MonkeyPatch) -> Any:
    # PEFT takes its dataclass from a package that it does not depend on; the standard one does the same.
    monkeypatch.setitem(sys.modules, "attr", dataclasses)
    from peft.tuners.lora.corda import preprocess_corda

    return preprocess_corda


def ours_corda(run: bool = True, **options: Any) -> veneer.PeftModel:
    model = models.make("llama")
    config = veneer.LoraConfig(**fields("corda", corda_config=options))
    veneer.preprocess_corda(model, config, run_model=(lambda: [model(**x) for x in SINGLE]) if run else None)
    return veneer.get_peft_model(model, config).eval()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(method: str, their_preprocess: Any) -> None:
    model = models.make("llama")
    config = peft.LoraConfig(**fields("corda", corda_config=TheirCorda(corda_method=method)))
    their_preprocess(model, config, run_model=lambda: [model(**x) for x in SINGLE])
    theirs, ours = silent_peft(model, config), ours_corda(corda_method=method)
    compare(theirs, ours, 1e-3)
    for x in SINGLE:
        torch.testing.assert_close(models.output(ours, x), models.output(theirs, x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(models.output(ours, x), models.output(models.make("llama"), x), rtol=1e-5, atol=1e-5)


def test_half_precision_covariances_are_close() -> None:
    exact, half = ours_corda(), ours_corda(use_float16_for_covariance=True)
    compare(exact, half, 1e-3)


def test_progress_is_printed_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    ours_corda()
    assert capsys.readouterr().out == ""
    ours_corda(verbose=True)
    assert capsys.readouterr().out.splitlines()[-1] == "CorDA: 6 of 6 layers split"


@pytest.mark.parametrize("kind", ["cache_file", "covariance_file"])
def test_a_file_takes_the_place_of_running(kind: str, tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "kept.safetensors")
    first = ours_corda(**{kind: path})
    again = ours_corda(run=False, **{kind: path})
    for name, tensor in dict(first.named_parameters()).items():
        assert torch.equal(dict(again.named_parameters())[name], tensor)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="PEFT's caches are pickles"):
        ours_corda(cache_file=str(path))
    path.unlink()
    ours_corda(cache_file=str(path))
    model = models.make("llama")
    config = veneer.LoraConfig(**fields("corda", corda_config={"cache_file": str(path)}, r=3))
    veneer.preprocess_corda(model, config)
    with pytest.raises(ConfigError, match=r"for a layer of .* at rank 3; call preprocess_corda with the same config"):
        veneer.get_peft_model(model, config)
    config = veneer.LoraConfig(**fields("corda", corda_config={"cache_file": str(path)}, target_modules=["k_proj"]))
    with pytest.raises(UsageError, match="made for another model or config"):
        veneer.preprocess_corda(model, config)


def test_another_model_can_be_watched() -> None:
    model, other = models.make("llama"), models.make("llama")
    config = veneer.LoraConfig(**fields("corda"))
    veneer.preprocess_corda(model, config, lambda: [other(**x) for x in SINGLE], other)
    compare(ours_corda(), veneer.get_peft_model(model, config), 1e-6)
    with pytest.raises(UsageError, match="run_model did not call"):
        veneer.preprocess_corda(models.make("llama"), config, lambda: [other(**x) for x in SINGLE])
    with pytest.raises(UsageError, match="needs run_model"):
        veneer.preprocess_corda(models.make("llama"), config)


def test_a_batch_of_several_sequences_counts_all_of_them() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    config = veneer.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights="corda")
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))
    veneer.preprocess_corda(model, config, lambda: model(x))
    rows = x.reshape(-1, 6) / x.max().abs()
    C = rows.t() @ rows
    C = C + torch.eye(6) * C.diagonal().mean() * 0.01
    U, S, Vh = torch.linalg.svd(model[0].weight.detach() @ C)
    best = U[:, :2] * S[:2] @ Vh[:2] @ torch.linalg.inv(C)
    layer = veneer.get_peft_model(model, config).base_model.model[0]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product, best, rtol=1e-4, atol=1e-5)


# LoRA-GA


def ours_ga(options: dict[str, Any], cache: str | None = None, run: bool = True, **more: Any) -> veneer.PeftModel:
    model = models.make("llama")
    config = veneer.LoraConfig(**fields("lora_ga", lora_ga_config=options, **more))
    steps = (lambda: [loss(model, x).backward() for x in BATCHES]) if run else (lambda: pytest.fail("not needed"))
    veneer.preprocess_loraga(model, config, steps, cache)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.training
    return veneer.get_peft_model(model, config).eval()


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_pefts(direction: str, scale: str) -> None:
    options = {"direction": direction, "scale": scale, "stable_gamma": 9}
    model = models.make("llama")
    config = peft.LoraConfig(**fields("lora_ga", lora_ga_config=peft.LoraGAConfig(**options)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.preprocess_loraga(model, config, lambda: [loss(model, x).backward() for x in BATCHES])
    theirs, ours = silent_peft(model, config), ours_ga(options)
    # PEFT searches for the largest singular value of W with a space of rank 4, and misses it by some thousandths.
    compare(theirs, ours, 1e-2 if scale == "weight_svd" else 1e-3)
    for x in BATCHES:
        torch.testing.assert_close(models.output(ours, x), models.output(models.make("llama"), x), rtol=1e-4, atol=1e-5)


def test_random_directions_are_drawn_from_torchs_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ours_ga({"direction": "random"}).base_model.layers["model.layers.0.mlp.down_proj"])
    a, b, c = (layer.lora_A["default"].weight for layer in drawn)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_first_step_goes_where_full_fine_tuning_would() -> None:
    """The change of W that the first gradient step makes is along the full gradient, far more than LoRA's."""
    aligned = {}
    for init in ("lora_ga", True):
        ours = ours_ga({"scale": "unit"}) if init == "lora_ga" else None
        if ours is None:
            ours = veneer.get_peft_model(models.make("llama"), veneer.LoraConfig(**fields(True))).eval()
        full = models.make("llama")
        for x in BATCHES:
            loss(full, x).backward()
            loss(ours, x).backward()
        path = "model.layers.1.mlp.down_proj"
        layer, W = ours.base_model.layers[path], full.get_submodule(path).weight
        A, B = (layer.tensors("default")[f"lora_{name}.weight"] for name in "AB")
        step = (B.grad @ A + B @ A.grad).detach()
        aligned[init] = float((step * W.grad).sum() / step.norm() / W.grad.norm())
    assert aligned["lora_ga"] > 0.9
    assert aligned["lora_ga"] > 1.2 * aligned[True]


def test_gradients_are_kept_in_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "gradients.safetensors")
    first, again = ours_ga({}, path), ours_ga({}, path, run=False)
    for name, tensor in dict(first.named_parameters()).items():
        assert torch.equal(dict(again.named_parameters())[name], tensor)


def test_lora_ga_on_transposed_layers_and_embeddings() -> None:
    for kind, targets in (("gpt2", ["c_attn"]), ("llama", ["embed_tokens"])):
        model, x = models.make(kind), models.batch(kind)
        before = models.output(model, x)
        config = veneer.LoraConfig(r=2, target_modules=targets, init_lora_weights="lora_ga")
        veneer.preprocess_loraga(model, config, lambda: loss(model, x).backward())  # noqa: B023 - called at once
        ours = veneer.get_peft_model(model, config).eval()
        torch.testing.assert_close(models.output(ours, x), before, rtol=1e-4, atol=1e-5)


def test_what_lora_ga_cannot_do_is_refused() -> None:
    model = models.make("llama")
    config = veneer.LoraConfig(**fields("lora_ga"))
    with pytest.raises(UsageError, match="train_step left no gradient on"):
        veneer.preprocess_loraga(model, config, lambda: None)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match=r"needs 10 components .* is 8 x 16; give it a rank of at most 4"):
        ours_ga({}, r=5)


# EVA


def ours_eva(**more: Any) -> veneer.PeftModel:
    model = veneer.get_peft_model(
        models.make("llama"), veneer.LoraConfig(**fields("eva", **more)), low_cpu_mem_usage=True
    )
    veneer.initialize_lora_eva_weights(model, BATCHES)
    return model.eval()


def theirs_eva(options: dict[str, Any], **more: Any) -> Any:
    config = peft.LoraConfig(**fields("eva", eva_config=peft.EvaConfig(**options), **more))
    model = silent_peft(models.make("llama"), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(model, BATCHES, show_progress_bar=False)
    return model


@pytest.mark.parametrize("options", [{"rho": 1.0}, {"rho": 1.0, "whiten": True}, {"rho": 2.0}, {"rho": 1.5}], ids=str)
def test_eva_is_pefts(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT's own search is a rough one, of twice the rank; it has an exact one too.
    exact = lambda n_components, **_: IncrementalPCA(n_components)  # noqa: E731
    monkeypatch.setattr("peft.tuners.lora.eva.IncrementalPCA", exact)
    theirs, ours = theirs_eva(options), ours_eva(eva_config=options)
    mine, yours = ours.peft_config["default"], theirs.peft_config["default"]
    assert mine.rank_pattern == yours.rank_pattern
    assert mine.alpha_pattern == yours.alpha_pattern
    assert bool(mine.rank_pattern) == (options["rho"] > 1)
    # PEFT whitens directions in place, and so twice where q and v share their input.
    compare(theirs, ours, 1e-3, only="down_proj" if options.get("whiten") else "")
    for x in BATCHES:
        assert torch.equal(models.output(ours, x), models.output(models.make("llama"), x))


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("adjust", [True, False])
def test_scalings_stay_when_ranks_change(adjust: bool, more: dict[str, Any]) -> None:
    ours = ours_eva(eva_config={"adjust_scaling_factors": adjust}, **more)
    layers = ours.base_model.layers.values()
    ranks = {layer.r["default"] for layer in layers}
    assert len(ranks) > 1
    assert sum(layer.r["default"] for layer in layers) == 4 * 6
    full = 8 / 4**0.5 if more else 8 / 4
    same = {round(layer.scaling["default"], 6) for layer in layers}
    assert (same == {round(full, 6)}) == adjust


def test_a_layer_without_a_direction_is_left_out_and_the_file_says_so(tmp_path: Path) -> None:
    model = veneer.get_peft_model(models.make("llama"), veneer.LoraConfig(**fields("eva")), low_cpu_mem_usage=True)
    directions = veneer.get_eva_state_dict(model, BATCHES)
    gone = next(iter(directions))
    directions[gone] = directions[gone][:0]
    veneer.initialize_lora_eva_weights(model, eva_state_dict=directions)
    path = gone.removeprefix("base_model.model.")
    assert path not in model.base_model.layers
    assert len(model.base_model.layers) == 5
    models.randomise(model)
    model.eval().save_pretrained(tmp_path)
    for library in (veneer, peft):
        again = library.PeftModel.from_pretrained(models.make("llama"), str(tmp_path))
        x = BATCHES[0]
        torch.testing.assert_close(models.output(again, x), models.output(model, x), rtol=1e-5, atol=1e-5)


def test_directions_can_be_gathered_before_the_model_is_adapted() -> None:
    config = veneer.LoraConfig(**fields("eva"))
    directions = veneer.get_eva_state_dict(models.make("llama"), BATCHES, config)
    assert not any(name.startswith("base_model") for name in directions)
    model = veneer.get_peft_model(models.make("llama"), config, low_cpu_mem_usage=True)
    veneer.initialize_lora_eva_weights(model, eva_state_dict=directions)
    compare(ours_eva(), model, 1e-6)


def test_without_directions_a_warning_says_what_is_missing() -> None:
    with pytest.warns(UserWarning, match="EVA has no directions yet.*initialize_lora_eva_weights"):
        veneer.get_peft_model(models.make("llama"), veneer.LoraConfig(**fields("eva", target_modules="all-linear")))


def test_the_adapter_is_as_trainable_and_active_as_before() -> None:
    ours = ours_eva()
    assert ours.active_adapters == ["default"]
    assert {name.split(".")[-3] for name, p in ours.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert not any(EVIDENCE in module.__dict__ for module in ours.modules())


def test_batches_smaller_than_the_ranks_are_put_together() -> None:
    small = [{"input_ids": batch["input_ids"][:1, :3]} for batch in BATCHES] * 4
    model = veneer.get_peft_model(models.make("llama"), veneer.LoraConfig(**fields("eva")), low_cpu_mem_usage=True)
    veneer.initialize_lora_eva_weights(model, small)
    assert {layer.lora_A["default"].weight.device.type for layer in model.base_model.layers.values()} == {"cpu"}


def test_padding_and_untrained_tokens_do_not_count() -> None:
    options = {"rho": 1.0}
    padded = []
    for batch in BATCHES:
        ids = batch["input_ids"]
        junk = torch.full_like(ids[:, :2], 5)
        labels = torch.cat([ids, junk], 1).clone()
        labels[:, :1] = -100
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(junk)], 1)
        padded.append({"input_ids": torch.cat([ids, junk], 1), "attention_mask": mask, "labels": labels})
    config = veneer.LoraConfig(**fields("eva", eva_config=options, target_modules=["q_proj"]))
    found = veneer.get_eva_state_dict(models.make("llama"), padded, config)
    rows: list[Tensor] = []
    model = models.make("llama")
    q = model.model.layers[0].self_attn.q_proj
    handle = q.register_forward_pre_hook(lambda module, args: rows.append(args[0][:, 1:].reshape(-1, models.D)))
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    handle.remove()
    every = torch.cat(rows).double()
    first = torch.linalg.svd(every - every.mean(0), full_matrices=False)[2][0]
    assert abs(float(found["model.layers.0.self_attn.q_proj"][0].double() @ first)) > 0.99
    theirs = their_eva(
        models.make("llama"),
        padded,
        peft.LoraConfig(**fields("eva", eva_config=peft.EvaConfig(**options), target_modules=["q_proj"])),
        show_progress_bar=False,
    )
    cosine = torch.nn.functional.cosine_similarity(
        found["model.layers.0.self_attn.q_proj"][:1], theirs["model.layers.0.self_attn.q_proj"][:1]
    )
    assert float(cosine.abs()) > 0.99


def test_what_eva_cannot_do_is_refused() -> None:
    config = veneer.LoraConfig(**fields("eva"))
    bare = models.make("llama")
    with pytest.raises(UsageError, match="needs a PeftModel"):
        veneer.initialize_lora_eva_weights(bare, BATCHES)
    with pytest.raises(UsageError, match="needs peft_config"):
        veneer.get_eva_state_dict(bare, BATCHES)
    with pytest.raises(UsageError, match="no batches"):
        veneer.get_eva_state_dict(bare, [], config)
    with pytest.raises(UsageError, match="must be mappings with input_ids"):
        veneer.get_eva_state_dict(bare, [{"x": torch.ones(1)}], config)
    with pytest.raises(UsageError, match="prepare_layer_inputs_fn names 'nothing'"):
        veneer.get_eva_state_dict(bare, BATCHES, config, prepare_layer_inputs_fn={"nothing": lambda *_: None})
    with pytest.raises(ConfigError, match=r"needs linear layers, and 'model\.embed_tokens'"):
        veneer.get_eva_state_dict(bare, BATCHES, veneer.LoraConfig(**fields("eva", target_modules=["embed_tokens"])))
    with pytest.raises(ConfigError, match="prepares init_lora_weights='eva', but the config has 'pissa'"):
        veneer.get_eva_state_dict(bare, BATCHES, veneer.LoraConfig(**fields("pissa")))
    model = veneer.get_peft_model(models.make("llama"), config, low_cpu_mem_usage=True)
    with pytest.raises(UsageError, match="needs a dataloader"):
        veneer.initialize_lora_eva_weights(model)
    with pytest.raises(ConfigError, match="do not go together"):
        veneer.initialize_lora_eva_weights(model, eva_state_dict={"model.layers.0.self_attn.q_proj": torch.ones(2, 16)})
    assert set(model.peft_config) == {"default"}


# All of them


@pytest.mark.parametrize(("init", "call"), [("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")])
def test_without_evidence_the_call_that_gathers_it_is_named(init: str, call: str) -> None:
    model = models.make("llama")
    with pytest.raises(ConfigError, match=rf"none was gathered about this Linear; call {call}\(model, config"):
        veneer.get_peft_model(model, veneer.LoraConfig(**fields(init)))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_evidence_is_used_up_and_kept_after_a_failure(init: str) -> None:
    model = models.make("llama")
    config = veneer.LoraConfig(**fields(init))
    if init == "corda":
        veneer.preprocess_corda(model, config, lambda: [model(**x) for x in SINGLE])
    else:
        veneer.preprocess_loraga(model, config, lambda: [loss(model, x).backward() for x in BATCHES])
    with pytest.raises(veneer.TargetError):
        veneer.get_peft_model(model, dataclasses.replace(config, target_modules=["q_poj"]))
    ours = veneer.get_peft_model(model, config)
    assert not any(EVIDENCE in module.__dict__ for module in ours.modules())


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_files_bring_the_start_and_serve_as_plain_lora(init: str, tmp_path: Path) -> None:
    x = BATCHES[0]
    model = ours_corda() if init == "corda" else ours_ga({})
    models.randomise(model)
    expected = models.output(model, x)
    model.save_pretrained(tmp_path / "own")
    again = veneer.PeftModel.from_pretrained(models.make("llama"), tmp_path / "own")
    assert torch.equal(models.output(again, x), expected)
    model.save_pretrained(tmp_path / "plain", as_plain_lora=True)
    theirs = peft.PeftModel.from_pretrained(models.make("llama"), str(tmp_path / "plain"))
    torch.testing.assert_close(models.output(theirs, x), expected, rtol=1e-4, atol=1e-5)


def test_pefts_corda_file_loads_once_the_data_is_read_again(tmp_path: Path, their_preprocess: Any) -> None:
    model = models.make("llama")
    config = peft.LoraConfig(**fields("corda", corda_config=TheirCorda()))
    their_preprocess(model, config, run_model=lambda: [model(**x) for x in SINGLE])
    theirs = silent_peft(model, config)
    models.randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    fresh = models.make("llama")
    with pytest.raises(AdapterFileError, match=r"they came from data; .* or gather its data again"):
        veneer.PeftModel.from_pretrained(fresh, tmp_path)
    config = veneer.PeftConfig.from_pretrained(tmp_path)
    veneer.preprocess_corda(fresh, config, lambda: [fresh(**x) for x in SINGLE])
    again = veneer.PeftModel.from_pretrained(fresh, tmp_path)
    x = SINGLE[0]
    torch.testing.assert_close(models.output(again, x), models.output(theirs, x), rtol=1e-4, atol=1e-5)


def test_evidence_of_an_adapted_model_is_that_of_its_base() -> None:
    model = veneer.get_peft_model(models.make("llama"), veneer.LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    models.randomise(model)
    config = veneer.LoraConfig(**fields("corda"))
    veneer.preprocess_corda(model, config, lambda: [model(**x) for x in SINGLE])
    model.add_adapter("second", config)
    alone = ours_corda()
    for path, layer in alone.base_model.layers.items():
        for key, tensor in layer.tensors("default").items():
            assert torch.equal(model.base_model.layers[path].tensors("second")[key], tensor)


def test_directions_that_never_settle_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.adapters.eva_search.PASSES", 2)
    config = veneer.LoraConfig(**fields("eva", eva_config={"tau": 1.0}))
    with pytest.raises(UsageError, match="did not settle in 2 passes"):
        veneer.get_eva_state_dict(models.make("llama"), BATCHES, config)


def test_progress_is_shown_on_a_terminal_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = veneer.LoraConfig(**fields("eva"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for show in (False, True):
        veneer.get_eva_state_dict(models.make("llama"), BATCHES, config, show_progress_bar=show)
        assert ("inputs settled" in capsys.readouterr().err) == show
