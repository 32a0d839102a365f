"""PEFT's names for adapted models of each task."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer
from tests import models
from veneer import LoraConfig, PeftModel, get_peft_model

KINDS = {
    "PeftModelForCausalLM": ("llama", "CAUSAL_LM"),
    "PeftModelForSeq2SeqLM": ("t5", "SEQ_2_SEQ_LM"),
    "PeftModelForSequenceClassification": ("bert", "SEQ_CLS"),
    "PeftModelForTokenClassification": ("bert-tokens", "TOKEN_CLS"),
    "PeftModelForQuestionAnswering": ("bert-qa", "QUESTION_ANS"),
    "PeftModelForFeatureExtraction": ("bert-body", "FEATURE_EXTRACTION"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_passes_for_the_name_of_its_task_as_in_peft(name: str) -> None:
    kind, task = KINDS[name]
    model = get_peft_model(models.make(kind), LoraConfig(task_type=task))
    theirs = peft.get_peft_model(models.make(kind), peft.LoraConfig(task_type=task))
    for other in KINDS:
        assert isinstance(model, getattr(veneer, other)) == isinstance(theirs, getattr(peft, other))
    assert not isinstance(models.make(kind), getattr(veneer, name))


@pytest.mark.parametrize("name", KINDS)
def test_the_name_makes_and_loads_models_of_its_task(name: str, tmp_path: Path) -> None:
    kind, _ = KINDS[name]
    cls: Any = getattr(veneer, name)
    config = LoraConfig()
    model = cls(models.make(kind), config, "some")
    assert type(model) is PeftModel
    assert isinstance(model, cls)
    assert config.task_type is None
    models.randomise(model, adapter="some")
    model.eval().save_pretrained(tmp_path)
    again = cls.from_pretrained(models.make(kind), tmp_path / "some")
    assert isinstance(again, cls)
    inputs = models.batch(kind)
    torch.testing.assert_close(models.output(again, inputs), models.output(model, inputs))


def test_a_model_without_a_task_has_no_such_name() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert not any(isinstance(model, getattr(veneer, name)) for name in KINDS)
