"""How well a model predicts a file: loss, perplexity and token accuracy, weighted by supervised tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veneer.data.encode import EncodedSet, EncodingReport, check_trained
from veneer.data.sources import Row
from veneer.tasks import task as tasks
from veneer.tasks.task import AbstractTask, measure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Score:
    """The figures of a model on a data set."""

    metrics: dict[str, float]
    """By name; ``loss`` is the mean over supervised tokens, in nats."""
    data: EncodingReport
    """What was measured on, and what was cut or left out."""
    notes: tuple[str, ...]
    """What was decided on the way, in sentences."""

    def to_dict(self) -> dict[str, Any]:
        """The metrics by name, the data's counts and the notes."""
        return {**self.metrics, "data": asdict(self.data), "notes": list(self.notes)}


def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    task: str,
    max_length: int,
    train_on: str,
    batch_size: int,
) -> Score:
    """Encode rows as training would, and measure a model on them, on the device that it is on.

    Raises:
        ConfigError: an unknown task.
        DataError: rows that are not of this task, or nothing to measure.
    """
    kind = tasks.get(task)
    tokenizer, notes = kind.prepare(rows, tokenizer)
    encoded = kind.encode(rows, tokenizer, max_length=max_length, train_on=train_on)
    check_trained(encoded.report, max_length)
    return Score(score_encoded(model, tokenizer, encoded, kind, batch_size=batch_size), encoded.report, tuple(notes))


def score_encoded(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, encoded: EncodedSet, task: AbstractTask, *, batch_size: int
) -> dict[str, float]:
    """The metrics of a model on sequences. Without gradients or dropout; the model's mode is put back."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return task.metrics(measure(task, model, encoded.examples, tokenizer, batch_size=batch_size, device=device))
