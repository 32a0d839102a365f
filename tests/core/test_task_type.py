"""TaskType: veneer's names, PEFT's spellings, and which tasks train a head."""

from __future__ import annotations

import peft
import pytest

from veneer import ConfigError, TaskType

HEADS = {"SEQ_CLS", "TOKEN_CLS", "MULTIPLE_CHOICE", "IMAGE_CLASSIFICATION", "QUESTION_ANSWERING"}


def test_names() -> None:
    assert [task.value for task in TaskType] == [
        "CAUSAL_LM",
        "SEQ_2_SEQ_LM",
        "SEQ_CLS",
        "TOKEN_CLS",
        "MULTIPLE_CHOICE",
        "SPEECH_SEQ_2_SEQ",
        "IMAGE_CLASSIFICATION",
        "QUESTION_ANSWERING",
        "TRANSLATION",
        "FEATURE_EXTRACTION",
        "OTHER",
    ]


def test_pefts_spellings() -> None:
    for theirs in peft.TaskType:
        ours = TaskType(theirs.value)
        assert ours.peft_name == theirs.value
        assert getattr(TaskType, theirs.value) is ours
    assert TaskType("QUESTION_ANS") is TaskType.QUESTION_ANS is TaskType.QUESTION_ANSWERING


def test_any_case() -> None:
    assert TaskType("causal_lm") is TaskType.CAUSAL_LM


def test_unknown_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'CAUSAL_LM'"):
        TaskType("CAUSAL_LLM")


def test_which_have_a_head() -> None:
    assert {task.value for task in TaskType if task.has_head} == HEADS


def test_tasks_that_peft_does_not_know_have_no_peft_name() -> None:
    known = {theirs.value for theirs in peft.TaskType}
    assert {task.peft_name for task in TaskType} - {None} == known
