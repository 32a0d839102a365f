"""Quantised transformers models, against PEFT on the same model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import veneer
from tests import models
from veneer.adapters.kbit import mark_merged
from veneer.core.errors import UsageError

pytest.importorskip("bitsandbytes")
# PEFT asks transformers by a name that it has since changed.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "llama"
    models.make("llama").save_pretrained(place)
    return place


def load(folder: Path, kind: str = "nf4", dtype: torch.dtype = torch.float32) -> Any:
    """In training mode: in evaluation mode bitsandbytes computes in bfloat16 or rounds inputs, where it can."""
    four = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four if kind == "nf4" else eight, dtype=dtype
    ).train()


def with_peft(model: Any, **more: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(**SETTINGS | more)).train()


def with_veneer(model: Any, **more: Any) -> veneer.PeftModel:
    return veneer.get_peft_model(model, veneer.LoraConfig(**SETTINGS | more)).train()


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    batch = models.batch("llama")
    out = model(**batch, labels=batch["input_ids"])
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def near(found: Tensor, expected: Tensor) -> None:
    """Two layers of attention and MLP in float32: a hundred roundings, most of them small."""
    assert (found - expected).abs().max() <= 128 * torch.finfo(torch.float32).eps * expected.abs().max()


@KINDS
def test_outputs_gradients_and_files_are_pefts(folder: Path, kind: str, tmp_path: Path) -> None:
    theirs = with_peft(load(folder, kind))
    models.randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = veneer.PeftModel.from_pretrained(load(folder, kind), tmp_path / "theirs", is_trainable=True).train()
    (logits, gradients), (expected, reference) = step(ours), step(theirs)
    near(logits, expected)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        near(gradient, reference[name])
    ours.save_pretrained(tmp_path / "ours")
    written, read = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in read.items())
    again = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path / "ours").train()
    assert torch.equal(models.output(again, models.batch("llama")), expected)


@KINDS
def test_all_linear_is_every_quantised_layer_and_not_the_head(folder: Path, kind: str) -> None:
    ours, theirs = with_veneer(load(folder, kind)), with_peft(load(folder, kind))
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    assert {target.kind for target in ours.match_report.targets} == {"bnb_4bit" if kind == "nf4" else "bnb_8bit"}
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@KINDS
def test_an_adapter_trained_on_few_bits_loads_on_the_full_base_without_a_warning(
    folder: Path, kind: str, tmp_path: Path
) -> None:
    ours = with_veneer(load(folder, kind))
    models.randomise(ours)
    ours.save_pretrained(tmp_path)
    full = transformers.AutoModelForCausalLM.from_pretrained(folder)
    veneer.PeftModel.from_pretrained(full, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@KINDS
def test_prepared_as_peft_prepares(folder: Path, kind: str, dtype: torch.dtype) -> None:
    def state(model: Any) -> dict[str, Any]:
        return {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    ours = veneer.prepare_model_for_kbit_training(load(folder, kind, dtype).requires_grad_(False))
    theirs = peft.prepare_model_for_kbit_training(load(folder, kind, dtype))
    assert state(ours) == state(theirs)
    assert ours.model.norm.weight.dtype == torch.float32
    assert ours.is_activation_checkpointing


@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_checkpointing_changes_no_gradient(folder: Path, options: dict[str, bool] | None) -> None:
    found = []
    for wanted in (True, False):
        model = veneer.prepare_model_for_kbit_training(load(folder), wanted, options)
        assert model.is_activation_checkpointing == wanted
        torch.manual_seed(1)
        adapted = with_veneer(model)
        models.randomise(adapted)
        found.append(step(adapted))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name])


def test_a_model_in_full_precision_is_frozen_and_widened_alone() -> None:
    model = veneer.prepare_model_for_kbit_training(models.make("llama", dtype=torch.bfloat16))
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    assert not model.is_activation_checkpointing


def test_what_cannot_be_prepared_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="comes before get_peft_model"):
        veneer.prepare_model_for_kbit_training(with_veneer(load(folder)))
    model = load(folder)
    model.supports_gradient_checkpointing = False
    with pytest.raises(UsageError, match="LlamaForCausalLM does not support gradient checkpointing"):
        veneer.prepare_model_for_kbit_training(model)


# Merging


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("into", ["dequantised", "requantised"])
@KINDS
def test_a_merged_model_loads_again(folder: Path, kind: str, into: Any, targets: Any, tmp_path: Path) -> None:
    adapted = with_veneer(load(folder, kind), target_modules=targets)
    models.randomise(adapted)
    unmerged = models.output(adapted, models.batch("llama"))
    merged = adapted.merge_and_unload(into=into)
    logits = models.output(merged, models.batch("llama"))
    if into == "dequantised":
        near(logits, unmerged)
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert torch.equal(models.output(again, models.batch("llama")), logits)
    quantised = "Linear4bit" if kind == "nf4" else "Linear8bitLt"
    left = "Linear" if into == "dequantised" and targets == "all-linear" else quantised
    assert type(again.model.layers[0].mlp.up_proj).__name__ == left
    assert type(again.model.layers[0].self_attn.q_proj).__name__ == ("Linear" if into == "dequantised" else quantised)


@pytest.mark.parametrize("into", ["dequantised", "requantised"])
@KINDS
def test_a_model_from_quantised_files_is_merged_and_saved(folder: Path, kind: str, into: Any, tmp_path: Path) -> None:
    """Where transformers alone cannot write again what it has read."""
    load(folder, kind).save_pretrained(tmp_path / "stored")
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    adapted = with_veneer(stored)
    models.randomise(adapted)
    merged = adapted.merge_and_unload(into=into).train()
    logits = models.output(merged, models.batch("llama"))
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train()
    assert torch.equal(models.output(again, models.batch("llama")), logits)


@KINDS
def test_requantised_is_what_peft_merges_into_in_silence(folder: Path, kind: str, tmp_path: Path) -> None:
    ours = with_veneer(load(folder, kind))
    models.randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(load(folder, kind), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Merge lora module to .-bit linear")
        expected = theirs.merge_and_unload().state_dict()
    merged = ours.merge_and_unload(into="requantised").state_dict()
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], expected["model.layers.0.mlp.up_proj.weight"])


def test_into_has_no_meaning_on_a_plain_model() -> None:
    """A model whose config was never quantised has nothing to be told."""
    model = veneer.get_peft_model(models.make("llama"), veneer.LoraConfig(target_modules="all-linear"))
    mark_merged(model.base_model, ["model.layers.0.self_attn.q_proj"])
    with pytest.raises(UsageError, match="none of the adapted layers is quantised"):
        model.merge_adapter(into="dequantised")


@KINDS
def test_plain_layers_take_the_dtype_of_the_embeddings(folder: Path, kind: str) -> None:
    adapted = with_veneer(load(folder, kind, torch.bfloat16))
    merged = adapted.merge_and_unload(into="dequantised")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert models.output(merged, models.batch("llama")).dtype == torch.bfloat16


# Trainer


def test_transformers_trainer_takes_the_model(folder: Path, tmp_path: Path) -> None:
    ids = [{"input_ids": row, "labels": row} for row in models.batch("llama", rows=4)["input_ids"]]
    model = with_veneer(veneer.prepare_model_for_kbit_training(load(folder)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        learning_rate=1e-2,
        save_steps=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(model=model, args=arguments, train_dataset=ids).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
