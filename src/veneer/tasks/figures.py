"""Figures of classifiers, by scikit-learn, from predictions and the labels that are right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from veneer.core.errors import UsageError
from veneer.tasks.labels import Labels
from veneer.tasks.task import Goals

SINGLE: Goals = {"accuracy": "max", "f1_macro": "max", "f1_micro": "max", "mcc": "max"}
MULTI: Goals = {"exact_match": "max", "f1_macro": "max", "f1_micro": "max"}
NUMBER: Goals = {"pearson": "max", "spearman": "max", "mean_absolute_error": "min"}
TOP5: Goals = {"top5_accuracy": "max"}
GOALS: dict[str, Goals] = {"single": SINGLE, "multi": MULTI, "regression": NUMBER}


def check_installed(package: str = "sklearn", extra: str = "metrics") -> None:
    """Refuse to begin what could not be measured.

    Raises:
        UsageError: the package is missing.
    """
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UsageError(f"The metrics of this task need {package}; install it: pip install 'veneer[{extra}]'.")


def figures(labels: Labels, truths: Sequence[Sequence[float]], guesses: Sequence[Sequence[float]]) -> dict[str, float]:
    """The metrics of ``GOALS[labels.kind]``.

    >>> figures(Labels(("no", "yes")), [[0], [1]], [[0], [1]])["accuracy"]
    1.0

    Args:
        labels: what there is to be right about.
        truths: of each example what ``Labels.ids`` gives.
        guesses: the same of the model.
    """
    from sklearn import metrics

    if not truths:
        return dict.fromkeys(GOALS[labels.kind], math.nan)
    if labels.kind == "regression":
        return _of_numbers([row[0] for row in truths], [row[0] for row in guesses])
    if labels.kind == "multi":
        found = {"exact_match": metrics.accuracy_score(truths, guesses)}
        averaged: dict[str, Any] = {"zero_division": 0}
    else:
        truths, guesses = [row[0] for row in truths], [row[0] for row in guesses]  # type: ignore[misc]
        found = {"accuracy": metrics.accuracy_score(truths, guesses)}
        with warnings.catch_warnings():
            # Few examples may have one label and one guess; the coefficient is 0 then.
            warnings.filterwarnings("ignore", "A single label was found", UserWarning)
            found["mcc"] = metrics.matthews_corrcoef(truths, guesses)
        averaged = {"zero_division": 0, "labels": list(range(len(labels.names)))}
    for average in ("macro", "micro"):
        found[f"f1_{average}"] = metrics.f1_score(truths, guesses, average=average, **averaged)
    return {name: float(found[name]) for name in GOALS[labels.kind]}


def top5(labels: Labels, truths: Sequence[int], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """The share of examples whose label is among the five of the highest scores.

    Args:
        labels: more than five.
        truths: the place of each example's label.
        scores: of each example one for every label.
    """
    from sklearn import metrics

    places = list(range(len(labels.names)))
    found = metrics.top_k_accuracy_score(truths, scores, k=5, labels=places) if truths else math.nan
    return {"top5_accuracy": float(found)}


def confusion(labels: Labels, truths: Sequence[int], guesses: Sequence[int]) -> dict[str, Any]:
    """How often each label (a row) was taken for each (a column), with precision, recall and F1 of each."""
    from sklearn import metrics

    places = list(range(len(labels.names)))
    counts = metrics.confusion_matrix(truths, guesses, labels=places)
    each = metrics.precision_recall_fscore_support(truths, guesses, labels=places, zero_division=0)
    per_label = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
        for name, p, r, f, n in zip(labels.names, *each, strict=True)
    }
    return {"confusion": {"labels": list(labels.names), "counts": counts.tolist()}, "per_label": per_label}


def _of_numbers(truths: list[float], guesses: list[float]) -> dict[str, float]:
    from scipy import stats

    found = {"mean_absolute_error": sum(abs(t - g) for t, g in zip(truths, guesses, strict=True)) / len(truths)}
    with warnings.catch_warnings():
        # All predictions the same: the correlation is undefined, and nan says so.
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        enough = len(truths) > 1
        found["pearson"] = float(stats.pearsonr(truths, guesses).statistic) if enough else math.nan
        found["spearman"] = float(stats.spearmanr(truths, guesses).statistic) if enough else math.nan
    return {name: found[name] for name in NUMBER}
