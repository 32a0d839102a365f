"""ensure_weight_tying: one update, or one trained copy, for all modules that share the embeddings' table."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

import veneer
from tests import models
from veneer.core.errors import AdapterFileError, ConfigError

INPUTS = models.batch("llama-tied")
CASES: dict[str, dict[str, Any]] = {
    "embeddings": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "regex": {"target_modules": r"(.*\.)?(embed_tokens|q_proj)"},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rslora": {"target_modules": ["embed_tokens"], "use_rslora": True},
}
cases = pytest.mark.parametrize("case", CASES)


def fields(case: str, **more: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 5, "ensure_weight_tying": True} | CASES[case] | more


def ours(case: str, **more: Any) -> Any:
    torch.manual_seed(1)
    made = veneer.get_peft_model(models.make("llama-tied"), veneer.LoraConfig(**fields(case, **more)))
    models.randomise(made)
    return made.eval()


def theirs(case: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(models.make("llama-tied"), peft.LoraConfig(**fields(case, init_lora_weights=False)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


@cases
def test_outputs_and_files_are_pefts(case: str, tmp_path: Path) -> None:
    original = theirs(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original.save_pretrained(tmp_path / "theirs")
    loaded = veneer.PeftModel.from_pretrained(models.make("llama-tied"), tmp_path / "theirs")
    expected = models.output(original, INPUTS)
    torch.testing.assert_close(models.output(loaded, INPUTS), expected)

    loaded.save_pretrained(tmp_path / "ours")
    written = safetensors.torch.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    reference = safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    # PEFT writes the frozen tables too.
    assert written.keys() == {key for key in reference if "base_layer" not in key}
    assert all(torch.equal(written[key], reference[key]) for key in written)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(models.make("llama-tied"), tmp_path / "ours")
    torch.testing.assert_close(models.output(back.eval(), INPUTS), expected)


@cases
def test_the_gradient_is_that_of_one_table(case: str) -> None:
    """Against plain torch: the model's own tie, with the update added to its one weight."""
    adapted = ours(case)
    wanted = {n: p for n, p in adapted.named_parameters() if p.requires_grad and "q_proj" not in n}
    assert len(wanted) == (1 if "modules_to_save" in CASES[case] else 2)
    adapted(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()

    merged = ours(case).merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    table = merged.model.embed_tokens.weight.requires_grad_()
    merged(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    if "modules_to_save" in CASES[case]:
        (copy,) = wanted.values()
        torch.testing.assert_close(copy.grad, table.grad, rtol=1e-4, atol=1e-5)
        return
    layer = adapted.base_model.layers["model.embed_tokens"]
    A, B, s = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"], layer.scaling["default"]
    torch.testing.assert_close(A.grad, s * B.t() @ table.grad.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B.grad, s * table.grad.t() @ A.t(), rtol=1e-4, atol=1e-5)


@cases
def test_merged_is_one_weight_and_the_same_model(case: str, tmp_path: Path) -> None:
    adapted = ours(case)
    expected = models.output(adapted, INPUTS)
    adapted.merge_adapter()
    torch.testing.assert_close(models.output(adapted, INPUTS), expected, rtol=1e-4, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.equal(models.output(adapted, INPUTS), expected)
    merged = adapted.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(models.output(again, INPUTS), expected, rtol=1e-4, atol=1e-5)


@cases
def test_the_base_comes_back_and_the_report_counts_one_table(case: str) -> None:
    base = models.make("llama-tied")
    table, frozen = base.lm_head.weight, models.output(base, INPUTS)
    adapted = veneer.get_peft_model(base, veneer.LoraConfig(**fields(case)))
    report = adapted.match_report
    trainable, total = adapted.get_nb_trainable_parameters()
    assert (report.trainable, report.total) == (trainable, total)
    models.randomise(adapted)
    with adapted.disable_adapter():
        torch.testing.assert_close(models.output(adapted, INPUTS), frozen)
    back = adapted.unload()
    assert back.lm_head.weight is back.model.embed_tokens.weight is table


def test_a_head_of_another_update_is_refused(tmp_path: Path) -> None:
    ours("embeddings").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(AdapterFileError, match="not the transpose"):
        veneer.PeftModel.from_pretrained(models.make("llama-tied"), tmp_path)


def test_a_file_without_the_head_is_refused(tmp_path: Path) -> None:
    """PEFT does not see a tie behind some regular expressions, and writes such files."""
    ours("embeddings").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: v for k, v in safetensors.torch.load_file(path).items() if "lm_head" not in k}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(AdapterFileError, match="turn it off"):
        veneer.PeftModel.from_pretrained(models.make("llama-tied"), tmp_path)


@pytest.mark.parametrize(
    "more", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}], ids=str
)
def test_what_is_not_the_same_transposed_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"transposing|use_dora"):
        ours("embeddings", **more)


def test_a_tie_that_factors_cannot_be_shared_in_is_refused() -> None:
    config = veneer.LoraConfig(target_modules=["shared"], ensure_weight_tying=True)
    with pytest.raises(ConfigError, match="shares the table"):
        veneer.get_peft_model(models.make("t5"), config)


@pytest.mark.parametrize(
    ("kind", "targets", "reason"),
    [("llama", ["embed_tokens"], "no module shares"), ("llama-tied", ["q_proj"], "changes none of them")],
)
def test_nothing_to_tie_is_said(kind: str, targets: list[str], reason: str) -> None:
    config = veneer.LoraConfig(target_modules=targets, ensure_weight_tying=True)
    with pytest.warns(UserWarning, match=reason):
        veneer.get_peft_model(models.make(kind), config)


def test_without_it_the_update_stays_on_the_named_module() -> None:
    with pytest.warns(UserWarning, match="ensure_weight_tying=True"):
        adapted = ours("embeddings", ensure_weight_tying=False)
    assert list(adapted.base_model.layers) == ["model.embed_tokens"]
