"""What classifiers share: the loss of a head's outputs, and what they say.

Shape legend: B examples, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from veneer.data.encode import Encoded
from veneer.tasks import figures
from veneer.tasks.labels import Labels
from veneer.tasks.task import BatchLoss, Prediction, Tally


def loss(labels: Labels, logits: Tensor, truth: Tensor | None) -> BatchLoss:
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


def predictions(labels: Labels, logits: Tensor) -> list[Prediction]:
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


def metrics(labels: Labels, tally: Tally, found: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
    """The mean loss, and the figures of this kind of label."""
    mean = tally.loss / tally.units if tally.units else math.nan
    truths = [example.labels for example in examples]
    return {"loss": mean, **figures.figures(labels, truths, [_guess(labels, prediction) for prediction in found])}


def details(labels: Labels, found: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
    """How often each label was taken for each, where there is one label an example."""
    if labels.kind != "single" or not found:
        return {}
    guesses = [labels.names.index(prediction["label"]) for prediction in found]
    return figures.confusion(labels, [int(example.labels[0]) for example in examples], guesses)


def has_top5(labels: Labels) -> bool:
    """Whether being among the five likeliest means anything."""
    return labels.kind == "single" and len(labels.names) > 5


def top5(labels: Labels, found: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
    """How often the right label is among the five likeliest, where there are more than five."""
    if not has_top5(labels):
        return {}
    scores = [[prediction["scores"][name] for name in labels.names] for prediction in found]
    return figures.top5(labels, [int(example.labels[0]) for example in examples], scores)


def told(labels: Labels, ids: Sequence[float]) -> str:
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
