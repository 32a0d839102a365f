"""A model and its adapter from the adapter's folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests import models
from veneer import LoraConfig, PeftConfig, UsageError, get_peft_model

KINDS = {
    "AutoPeftModelForCausalLM": ("llama", "CAUSAL_LM"),
    "AutoPeftModelForSeq2SeqLM": ("t5", "SEQ_2_SEQ_LM"),
    "AutoPeftModelForSequenceClassification": ("bert", "SEQ_CLS"),
    "AutoPeftModelForTokenClassification": ("bert-tokens", "TOKEN_CLS"),
    "AutoPeftModelForQuestionAnswering": ("bert-qa", "QUESTION_ANS"),
    "AutoPeftModelForFeatureExtraction": ("bert-body", "FEATURE_EXTRACTION"),
}


def saved(kind: str, task: str | None, folder: Path, grown_to: int = models.V) -> Any:
    """A base model and an adapter of it on disk."""
    base = models.make(kind)
    base.save_pretrained(folder / "base")
    base.config.name_or_path = base.name_or_path = str(folder / "base")
    if grown_to > models.V:
        base.resize_token_embeddings(grown_to)
    model = get_peft_model(base, LoraConfig(task_type=task)).eval()
    models.randomise(model)
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("by_task", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_base_and_adapter_are_loaded(name: str, by_task: bool, tmp_path: Path) -> None:
    kind, task = KINDS[name]
    right = saved(kind, task, tmp_path)
    cls: Any = veneer.AutoPeftModel if by_task else getattr(veneer, name)
    model = cls.from_pretrained(tmp_path / "adapter")
    assert type(model) is veneer.PeftModel
    assert not model.training
    assert type(model.get_base_model()) is type(right.get_base_model())
    inputs = models.batch(kind)
    torch.testing.assert_close(models.output(model, inputs), models.output(right, inputs))


def test_options(tmp_path: Path) -> None:
    saved("llama", "CAUSAL_LM", tmp_path)
    load = veneer.AutoPeftModelForCausalLM.from_pretrained
    model = load(tmp_path, "some", True, subfolder="adapter", torch_dtype=torch.bfloat16)
    assert model.active_adapters == ["some"]
    assert model.dtype == torch.bfloat16
    assert any(p.requires_grad for p in model.parameters())
    assert load(tmp_path / "adapter").dtype == torch.float32
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    config.lora_alpha = 1
    assert load(tmp_path / "adapter", config=config).peft_config["default"].lora_alpha == 1


def test_an_adapter_without_a_task_names_the_class_it_was_made_on(tmp_path: Path) -> None:
    right = saved("llama", None, tmp_path)
    model = veneer.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(model.get_base_model()) is type(right.get_base_model())
    (config := PeftConfig.from_pretrained(tmp_path / "adapter")).auto_mapping = None
    with pytest.raises(UsageError, match="neither its task nor a class"):
        veneer.AutoPeftModel.from_pretrained(tmp_path / "adapter", config=config)
    config.base_model_name_or_path = None
    with pytest.raises(UsageError, match="does not say which base model"):
        veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", config=config)


@pytest.mark.filterwarnings("ignore:The vocabulary was resized:UserWarning")
@pytest.mark.filterwarnings("ignore:The adapter brings its own:UserWarning")
@pytest.mark.parametrize("size", [models.V - 5, models.V + 3])
def test_embeddings_grow_to_the_tokenizer_beside_the_adapter(size: int, tmp_path: Path) -> None:
    """PEFT also cuts a table that is larger than the tokenizer, as those that are padded to a round size are."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    right = saved("llama", "CAUSAL_LM", tmp_path, grown_to=max(size, models.V))
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "adapter")
    model = veneer.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(model.get_input_embeddings().weight) == max(size, models.V)
    inputs = models.batch("llama")
    torch.testing.assert_close(models.output(model, inputs), models.output(right, inputs))
