"""What classifiers of whole examples share: a text's, an image's.

Shape legend: B examples, C labels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn import functional as F

from veneer.data.encode import Encoded
from veneer.data.rows import Row
from veneer.tasks import figures
from veneer.tasks.figures import GOALS, TOP5
from veneer.tasks.labels import UNKNOWN, Labels, value_of
from veneer.tasks.task import AbstractTask, BatchLoss, Goals, Piece, Prediction, Tally

COLUMN = "label"


@dataclass(frozen=True)
class AbstractClassifier(AbstractTask):
    """A head's outputs are compared with the row's label, labels or number; a unit is an example."""

    labels: Labels = UNKNOWN

    packs: ClassVar[bool] = False
    top5: ClassVar[bool] = False
    """Whether to tell as well how often the right label is among the five likeliest."""

    @abstractmethod
    def seen(self, row: Row) -> object:
        """What the model is to see of a row.

        Raises:
            DataError: it is not there.
        """

    @abstractmethod
    def inputs(self, examples: Sequence[Encoded], processor: Any) -> dict[str, Tensor]:
        """A batch without its labels."""

    @abstractmethod
    def told(self, example: Encoded, processor: Any) -> str:
        """What the model sees of an example, in words."""

    @property
    def goals(self) -> Goals:
        return {"loss": "min", **GOALS[self.labels.kind], **(TOP5 if self._has_top5 else {})}

    def to_dict(self) -> dict[str, Any]:
        return self.labels.to_dict()

    def restored(self, values: Mapping[str, Any]) -> Self:
        return replace(self, labels=Labels.restored(values))

    def model_options(self) -> dict[str, Any]:
        return self.labels.model_options()

    def check(self, row: Row, *, labelled: bool = True) -> None:
        self.seen(row)
        if labelled:
            value_of(row, COLUMN)

    def prepare(self, rows: Iterable[Row], processor: Any) -> tuple[Any, list[str]]:
        return processor, []

    def ids(self, row: Row, *, labelled: bool) -> list[int] | list[float]:
        """A row's label as numbers; none where it is to be told."""
        return self.labels.ids(row, COLUMN) if labelled else []

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        batch = self.inputs(examples, processor)
        return {**batch, "labels": self.labels.tensor(e.labels for e in examples)} if examples[0].labels else batch

    def units(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        return _loss(self.labels, logits, batch.get("labels"))

    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        return _predictions(self.labels, outputs)

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        labels, truths = self.labels, [example.labels for example in examples]
        found = {
            "loss": tally.loss / tally.units if tally.units else math.nan,
            **figures.figures(labels, truths, [_guess(labels, prediction) for prediction in predictions]),
        }
        if self._has_top5:
            scores = [[prediction["scores"][name] for name in labels.names] for prediction in predictions]
            found |= figures.top5(labels, [int(truth[0]) for truth in truths], scores)
        return found

    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        if self.labels.kind != "single" or not predictions:
            return {}
        guesses = [self.labels.names.index(prediction["label"]) for prediction in predictions]
        return figures.confusion(self.labels, [int(example.labels[0]) for example in examples], guesses)

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        seen = self.told(example, processor)
        return [Piece(seen, trained=False), Piece(_words(self.labels, example.labels), trained=True)]

    @property
    def _has_top5(self) -> bool:
        return self.top5 and self.labels.kind == "single" and len(self.labels.names) > 5


def _loss(labels: Labels, logits: Tensor, truth: Tensor | None) -> BatchLoss:
    """The summed loss of a head's outputs.

    Args:
        labels: cross entropy for one label, the mean over all labels of the binary one for several, the squared
            error for a number.
        logits: (B, C); of a regression (B, 1).
        truth: what ``Labels.tensor`` gives; None, when there is only something to read, counts as no unit.
    """
    if truth is None:
        return BatchLoss(logits.new_zeros(()), Tally(), logits.detach())
    weight = labels.weight(logits.device)
    if labels.kind == "regression":
        total = F.mse_loss(logits.squeeze(-1), truth, reduction="sum")
        correct = 0
    elif labels.kind == "multi":
        total = F.binary_cross_entropy_with_logits(logits, truth, weight=weight, reduction="sum") / logits.shape[-1]
        correct = int(((logits > 0) == (truth > 0)).all(-1).sum())
    else:
        total = F.cross_entropy(logits, truth, weight=weight, reduction="sum")
        correct = int((logits.argmax(-1) == truth).sum())
    return BatchLoss(total, Tally(float(total.detach()), len(truth), correct), logits.detach())


def _predictions(labels: Labels, logits: Tensor) -> list[Prediction]:
    """From (B, C) outputs to the labels they mean, with a score for each; of a regression, to numbers."""
    if labels.kind == "regression":
        return [{"value": float(value)} for value in logits.squeeze(-1)]
    scores = (logits.sigmoid() if labels.kind == "multi" else logits.softmax(-1)).tolist()
    found: list[Prediction] = []
    for row in scores:
        each = dict(zip(labels.names, row, strict=True))
        if labels.kind == "multi":
            found.append({"labels": [name for name, score in each.items() if score > 0.5], "scores": each})
        else:
            best = max(each, key=each.__getitem__)
            found.append({"label": best, "score": each[best], "scores": each})
    return found


def _words(labels: Labels, ids: Sequence[float]) -> str:
    """An example's label in words."""
    if labels.kind == "regression":
        return f" {ids[0]:g}"
    if labels.kind == "multi":
        names = [name for name, holds in zip(labels.names, ids, strict=True) if holds]
        return f" {', '.join(names) or 'no label'}"
    return f" {labels.names[int(ids[0])]}"


def _guess(labels: Labels, prediction: Prediction) -> list[float]:
    if labels.kind == "regression":
        return [prediction["value"]]
    if labels.kind == "multi":
        return [int(name in prediction["labels"]) for name in labels.names]
    return [labels.names.index(prediction["label"])]
