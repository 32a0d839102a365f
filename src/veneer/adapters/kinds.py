"""PEFT's classes of adapted models for each task: names for one class, told apart by the active adapter's task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, final

from torch import nn

from veneer.adapters.model import PeftModel, get_peft_model
from veneer.core.config import PeftConfig
from veneer.core.task_type import TaskType


@final
class _Kind(type):
    """The class of these names: calling one adapts a model for its task."""

    task: TaskType

    def __call__(cls, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **options: Any) -> Any:
        return get_peft_model(model, replace(peft_config, task_type=cls.task), adapter_name, **options)

    def __instancecheck__(cls, instance: object) -> bool:
        if type(instance) is not PeftModel or not instance.active_adapters:
            return False
        return instance.active_peft_config.task_type == cls.task

    def from_pretrained(cls, model: nn.Module, model_id: str | Path, *args: Any, **options: Any) -> PeftModel:
        """See ``PeftModel.from_pretrained``."""
        return PeftModel.from_pretrained(model, model_id, *args, **options)


@final
class PeftModelForCausalLM(metaclass=_Kind):
    """An adapted language model.

    >>> isinstance(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")), PeftModelForCausalLM)
    True
    """

    task = TaskType.CAUSAL_LM


@final
class PeftModelForFeatureExtraction(metaclass=_Kind):
    """An adapted model of embeddings."""

    task = TaskType.FEATURE_EXTRACTION


@final
class PeftModelForQuestionAnswering(metaclass=_Kind):
    """An adapted model that finds answers in a text."""

    task = TaskType.QUESTION_ANSWERING


@final
class PeftModelForSeq2SeqLM(metaclass=_Kind):
    """An adapted encoder-decoder model."""

    task = TaskType.SEQ_2_SEQ_LM


@final
class PeftModelForSequenceClassification(metaclass=_Kind):
    """An adapted classifier of texts."""

    task = TaskType.SEQ_CLS


@final
class PeftModelForTokenClassification(metaclass=_Kind):
    """An adapted classifier of tokens."""

    task = TaskType.TOKEN_CLS
