"""Which class and task a model is of, and a bar that stays out of files."""

from __future__ import annotations

import pytest
import transformers

from veneer import UsageError
from veneer.cli.weights import architecture, counting, task_of


@pytest.mark.parametrize(
    ("model_class", "task"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("BertForTokenClassification", "TOKEN_CLS"),
        ("NoSuchModel", None),
    ],
)
def test_tasks(model_class: str, task: str | None) -> None:
    assert task_of(model_class) == task


def test_the_class_that_a_model_was_saved_as() -> None:
    config = transformers.LlamaConfig(architectures=["Mine", "LlamaForCausalLM"])
    assert architecture(config, "x") == "LlamaForCausalLM"
    for none in (None, ["Mine"]):
        with pytest.raises(UsageError, match="of which this transformers has none"):
            architecture(transformers.LlamaConfig(architectures=none), "x")


def test_counting_shows_nothing_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("weights") as said:
        said(1, 2)
        said(2, 2)
    assert capsys.readouterr() == ("", "")
