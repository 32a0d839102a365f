"""Converted adapters: the same update, bit for bit where it can be, and errors that are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.adapters.making import adapted, best, close, config_of, peft_updates_in, saved, updates, updates_in
from veneer import LoraConfig, MergeError, PeftModel, UsageError, get_peft_model
from veneer.adapters import files
from veneer.adapters.convert import convert, convert_to_lora, save_as_lora
from veneer.adapters.lowrank import Rank
from veneer.core.records import ApproximatedLayer
from veneer.variants.adalora import AdaLoraConfig
from veneer.variants.vera import VeraConfig

WEIGHTS = "adapter_model.safetensors"
LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 1}},
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def report_of(model: PeftModel, rank: Rank | None) -> tuple[ApproximatedLayer, ...]:
    return convert(model.base_model, "default", rank).layers


@pytest.mark.parametrize("config", LORAS.values(), ids=LORAS)
def test_lora_keeps_its_factors(config: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**config)
    model.save_pretrained(tmp_path / "a")
    save_as_lora(tmp_path / "b", model)
    before, after = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert config_of(tmp_path / "b")["use_rslora"] is False
    close(updates_in(tmp_path / "b"), updates(model), relative=1e-7)
    close(peft_updates_in(tmp_path / "b"), updates(model), relative=1e-6)
    assert {layer.error for layer in report_of(model, None)} == {0.0}


@pytest.mark.parametrize("rank", [2, 3, 7, 0.8])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_every_layer_is_the_best_of_its_rank(config: dict[str, Any], rank: Rank, tmp_path: Path) -> None:
    model = adapted(**config)
    wanted = updates(model)
    report = {layer.path: layer for layer in report_of(model, rank)}
    save_as_lora(tmp_path / "b", model, rank)
    close(updates_in(tmp_path / "b"), {path: best(wanted[path], layer.r) for path, layer in report.items()})
    close(peft_updates_in(tmp_path / "b"), updates_in(tmp_path / "b"))
    for path, layer in report.items():
        S = torch.linalg.svdvals(wanted[path])
        kept = float(S[: layer.r].square().sum() / S.square().sum())
        missed = float((updates_in(tmp_path / "b")[path] - wanted[path]).norm() / wanted[path].norm())
        assert layer.kept == pytest.approx(kept, abs=1e-5)
        assert layer.error == pytest.approx(missed, abs=1e-6)
        assert layer.norm == pytest.approx(float(wanted[path].norm()), rel=1e-5)
        assert layer.r == rank or kept >= 0.8


def test_a_full_rank_meets_dora_exactly(tmp_path: Path) -> None:
    model = adapted(use_dora=True)
    given = models.batch("llama")
    save_as_lora(tmp_path / "b", model, 24)
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path / "b")
    torch.testing.assert_close(models.output(again, given), models.output(model, given), rtol=1e-4, atol=1e-5)
    assert config_of(tmp_path / "b")["use_dora"] is False


def test_dora_needs_a_rank() -> None:
    with pytest.raises(UsageError, match="q_proj' has the full rank of 16, so no plain LoRA is exactly it"):
        convert_to_lora(adapted(use_dora=True))


@pytest.mark.parametrize("kind", models.MODELS)
def test_every_family(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, use_rslora=True)
    given = models.batch(kind)
    expected = models.output(model, given)
    save_as_lora(tmp_path / "b", model)
    again = PeftModel.from_pretrained(models.make(kind), tmp_path / "b")
    torch.testing.assert_close(models.output(again, given), expected)


@pytest.mark.parametrize("rank", [None, 4])
def test_what_is_beside_the_factors_comes_along(rank: Rank | None, tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "fc1"], "lora_bias": True, "bias": "all", "modules_to_save": ["lm_head"]}
    model = adapted("opt", **config, lora_dropout=0.1, task_type="CAUSAL_LM")
    with torch.no_grad():
        for value in model.base_model.biases.values("default").values():
            value += 0.1
    given = models.batch("opt")
    expected = models.output(model, given)
    save_as_lora(tmp_path / "b", model, rank)
    again = PeftModel.from_pretrained(models.make("opt"), tmp_path / "b")
    torch.testing.assert_close(models.output(again, given), expected, rtol=1e-5, atol=1e-5)
    new = again.peft_config["default"]
    assert (new.lora_dropout, new.task_type, new.bias, new.lora_bias) == (0.1, "CAUSAL_LM", "all", True)


def test_narrow_factors_stay_as_they_are(tmp_path: Path) -> None:
    model = adapted(use_rslora=True)
    model.base_model.to(torch.bfloat16)
    _, tensors = convert_to_lora(model)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    close(
        {layer.path: torch.zeros(1) for layer in report_of(model, None)}, dict.fromkeys(updates(model), torch.zeros(1))
    )


def test_an_adapter_that_is_merged_at_the_moment(tmp_path: Path) -> None:
    model = adapted(use_dora=True)
    wanted = updates(model)
    model.merge_adapter()
    save_as_lora(tmp_path / "b", model, 24)
    close(updates_in(tmp_path / "b"), wanted, relative=1e-5)


def test_pefts_file_is_read(tmp_path: Path) -> None:
    """What is converted is what PEFT wrote."""
    import peft

    other = peft.get_peft_model(
        models.make("llama"), peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj", "v_proj"])
    )
    models.randomise(other)
    given = models.batch("llama")
    expected = models.output(other, given)
    other.save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(models.make("llama"), tmp_path / "a")
    save_as_lora(tmp_path / "b", model, 16)
    again = peft.PeftModel.from_pretrained(models.make("llama"), tmp_path / "b")
    torch.testing.assert_close(models.output(again, given), expected, rtol=1e-4, atol=1e-5)


def test_the_config_and_the_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    model = adapted()
    config, tensors = convert_to_lora(model, 3)
    save_as_lora(tmp_path / "b", model, 3)
    read = files.read(tmp_path / "b")
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (3, 3)
    assert read.tensors.keys() == tensors.keys()
    assert all(torch.equal(read.tensors[key], tensor) for key, tensor in tensors.items())
    # The mark of the base goes along.
    saved(tmp_path / "a")
    assert read.metadata == files.read(tmp_path / "a").metadata


def test_arguments_without_meaning(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(UsageError, match="There is no adapter 'other'"):
        convert_to_lora(model, adapter_name="other")
    with pytest.raises(UsageError, match="The rank is 0"):
        convert_to_lora(model, 0)
    with pytest.raises(UsageError, match=r"The rank is 1\.5"):
        convert_to_lora(model, 1.5)
    with pytest.raises(UsageError, match="nothing is compiled"):
        save_as_lora(tmp_path, model, compile_kwargs={})
    assert not list(tmp_path.iterdir())


def test_adalora_has_the_rank_that_is_left_of_it(tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=6, target_r=2, total_step=10, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(models.make("llama"), config)
    models.randomise(model)
    with torch.no_grad():
        for layer in model.base_model.layers.values():
            layer.lora_E["default"][[0, 2, 5]] = 0
    given = models.batch("llama")
    expected = models.output(model, given)
    report = report_of(model, None)
    assert {layer.r for layer in report} == {3}
    assert max(layer.error for layer in report) < 1e-6
    save_as_lora(tmp_path / "b", model)
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path / "b")
    torch.testing.assert_close(models.output(again, given), expected, rtol=1e-5, atol=1e-5)
    assert again.peft_config["default"].target_modules == ["q_proj", "down_proj"]
    close(peft_updates_in(tmp_path / "b"), updates(model))


STARTS = ("pissa", "pissa_niter_4", "olora", "orthogonal", "mica")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}], ids=["", "rslora"])
def test_what_a_start_took_from_the_weight_is_taken_off(start: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(init_lora_weights=start, target_modules=["q_proj", "down_proj"], **more)
    given = models.batch("llama")
    expected = models.output(model, given)
    report = report_of(model, None)
    save_as_lora(tmp_path / "b", model)
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path / "b")
    torch.testing.assert_close(models.output(again, given), expected, rtol=1e-5, atol=1e-5)
    close(peft_updates_in(tmp_path / "b"), updates(model))
    subtracts = start in ("pissa", "pissa_niter_4", "olora")
    assert {layer.r / layer.r_before for layer in report if layer.r_before} == {2 if subtracts else 1}
    assert config_of(tmp_path / "b")["init_lora_weights"] is True


def test_a_start_whose_weight_is_another_one_needs_a_rank(tmp_path: Path) -> None:
    model = adapted(init_lora_weights="loftq", target_modules=["down_proj"])
    with pytest.raises(UsageError, match="full rank"):
        convert_to_lora(model)
    save_as_lora(tmp_path / "b", model, 16)
    close(updates_in(tmp_path / "b"), updates(model), relative=1e-5)


def test_vera_has_factors_of_its_own(tmp_path: Path) -> None:
    model = get_peft_model(models.make("llama"), VeraConfig(r=5, target_modules=["q_proj", "o_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.copy_(torch.randn_like(parameter))
    given = models.batch("llama")
    expected = models.output(model, given)
    report = report_of(model, None)
    assert {layer.r for layer in report} == {5}
    assert max(layer.error for layer in report) < 1e-6
    save_as_lora(tmp_path / "b", model)
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path / "b")
    torch.testing.assert_close(models.output(again, given), expected, rtol=1e-5, atol=1e-5)


def test_qalora_has_factors_for_every_input(tmp_path: Path) -> None:
    model = adapted(use_qalora=True, qalora_group_size=4)
    wanted = updates(model)
    save_as_lora(tmp_path / "b", model)
    close(peft_updates_in(tmp_path / "b"), wanted)
    assert config_of(tmp_path / "b")["use_qalora"] is False


@pytest.mark.parametrize("rank", [None, 4])
def test_an_activated_adapter_stays_activated(rank: Rank | None, tmp_path: Path) -> None:
    model = adapted(alora_invocation_tokens=[5, 6], use_rslora=True, lora_bias=True)
    given = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]])}
    expected = models.output(model, given)
    save_as_lora(tmp_path / "b", model, rank)
    again = PeftModel.from_pretrained(models.make("llama"), tmp_path / "b")
    torch.testing.assert_close(models.output(again, given), expected, rtol=1e-5, atol=1e-5)


def test_factors_that_are_several_pairs_are_kept(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, padding=1, groups=2))

    grouped = get_peft_model(model(), LoraConfig(r=2, lora_alpha=7, use_rslora=True, target_modules=["0"]))
    models.randomise(grouped)
    given = torch.randn(2, 4, 5, 5)
    save_as_lora(tmp_path, grouped)
    again = PeftModel.from_pretrained(model(), tmp_path)
    torch.testing.assert_close(again(given), grouped(given))
    assert again.peft_config["default"].use_rslora is False
    with pytest.raises(MergeError, match="has no place in the weight"):
        save_as_lora(tmp_path, grouped, 2)


def test_convolutions(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Conv2d(6, 4, 1))

    convolved = get_peft_model(model(), LoraConfig(r=3, lora_alpha=7, target_modules=["0", "1"]))
    models.randomise(convolved)
    given = torch.randn(2, 3, 5, 5)
    expected = convolved(given)
    for number, rank in enumerate((None, 3)):
        save_as_lora(tmp_path / f"{number}", convolved, rank)
        again = PeftModel.from_pretrained(model(), tmp_path / f"{number}")
        torch.testing.assert_close(again(given), expected, rtol=1e-5, atol=1e-5)


def test_an_update_of_zeros() -> None:
    model = get_peft_model(models.make("llama"), AdaLoraConfig(total_step=10, target_modules=["q_proj"]))
    assert {(layer.r, layer.norm, layer.error) for layer in report_of(model, None)} == {(1, 0.0, 0.0)}
