"""The names of labels: read from training data or given, in one order that goes with the weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, final

import torch
from torch import Tensor

from veneer.core.errors import ConfigError, DataError, listed, nearest
from veneer.data.rows import Row
from veneer.tasks.heads import names_of
from veneer.tasks.options import TaskOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["single", "multi", "regression"]

BALANCED = "balanced"


@final
@dataclass(frozen=True)
class Labels:
    """What is told of an example: one of these names, any number of them, or a number."""

    names: tuple[str, ...]
    """In the order of the head's outputs; of a regression, none."""
    kind: Kind = "single"
    weights: tuple[float, ...] = ()
    """What an example of each label counts in the loss, 1 on average over the training data; empty: all the same."""

    @classmethod
    def of(cls, rows: Iterable[Row], options: TaskOptions, column: str) -> Self:
        """The labels of training rows.

        Raises:
            ConfigError: options that do not fit each other or the rows.
            DataError: a row without a label, or with one that is of another kind.
        """
        # The labels alone: rows may be more than memory holds.
        labelled = [Row(row.origin, {column: value_of(row, column)}) for row in rows]
        kind = _kind(labelled, options, column)
        if kind == "regression":
            if options.labels is not None or options.class_weights is not None:
                raise ConfigError(
                    "labels and class_weights have no meaning for a regression, whose labels are numbers."
                )
            for row in labelled:
                number(row, column)
            return cls((), kind)
        counts = Counter(name for row in labelled for name in named(row, column, kind))
        names = given(options.labels) if options.labels is not None else tuple(sorted(counts, key=_order))
        found = cls(names, kind)
        for row in labelled:
            found.ids(row, column)
        if len(names) < 2 and kind == "single":
            raise DataError(f"The training data has one label only, {listed(names)}; expected at least two.")
        return cls(names, kind, _weights(options.class_weights, names, counts))

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> Self:
        """The labels of what ``to_dict`` gave."""
        names, weights = tuple(values["labels"]), tuple(float(weight) for weight in values["class_weights"])
        if values["problem"] not in ("single", "multi", "regression") or not all(isinstance(n, str) for n in names):
            raise ValueError("expected problem, labels and class_weights")
        return cls(names, values["problem"], weights)

    @classmethod
    def described(cls, config: PretrainedConfig) -> Self:
        """The labels that a model's config names.

        Raises:
            ConfigError: it names none.
        """
        if config.problem_type == "regression":
            return cls((), "regression")
        names = names_of(config)
        if names is None:
            raise ConfigError(
                "Nothing says which labels this model's head tells: its config names none, and no task.json stands "
                "beside it; give an adapter or a model that was trained on them."
            )
        return cls(tuple(names), "multi" if config.problem_type == "multi_label_classification" else "single")

    def to_dict(self) -> dict[str, Any]:
        """Names, kind and weights, as JSON."""
        return {"problem": self.kind, "labels": list(self.names), "class_weights": list(self.weights)}

    def model_options(self) -> dict[str, Any]:
        """The options of ``from_pretrained`` for a head with an output for each label."""
        if self.kind == "regression":
            return {"num_labels": 1, "problem_type": "regression"}
        problem = "multi_label_classification" if self.kind == "multi" else "single_label_classification"
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: at for at, name in enumerate(self.names)},
            "problem_type": problem,
        }

    def ids(self, row: Row, column: str) -> list[int] | list[float]:
        """A row's label as numbers: its place, a 0 or 1 for each, or the number itself.

        Raises:
            DataError: a label that is none of these.
        """
        if self.kind == "regression":
            return [number(row, column)]
        found = [self.place(name, row.origin, column) for name in named(row, column, self.kind)]
        return [int(at in found) for at in range(len(self.names))] if self.kind == "multi" else found

    def place(self, name: str, origin: str, column: str) -> int:
        """The place of a label.

        Raises:
            DataError: there is no such label.
        """
        if name not in self.names:
            raise DataError(
                f"{origin} has {column} = {name!r}; expected one of the labels {listed(self.names, most=20)}."
                f"{nearest(name, self.names)}"
            )
        return self.names.index(name)

    def tensor(self, examples: Iterable[Sequence[float]]) -> Tensor:
        """(B,) int64 places; of several labels (B, labels) float32; of a regression (B,) float32."""
        rows = list(examples)
        if self.kind == "multi":
            return torch.tensor(rows, dtype=torch.float32)
        first = [row[0] for row in rows]
        return torch.tensor(first, dtype=torch.float32 if self.kind == "regression" else torch.int64)

    def weight(self, device: torch.device) -> Tensor | None:
        """(labels,) float32, what each counts; None when all count the same."""
        return torch.tensor(self.weights, device=device) if self.weights else None


UNKNOWN = Labels(())
"""Those of a task that has seen no data yet."""


def given(text: str) -> tuple[str, ...]:
    """Names that are given in one text, with commas between.

    Raises:
        ConfigError: fewer than two, an empty one, or one that is there twice.
    """
    names = tuple(name.strip() for name in text.split(","))
    if len(names) < 2 or not all(names) or len(set(names)) != len(names):
        raise ConfigError(f"labels is {text!r}; expected at least two names, each once, as in negative,positive.")
    return names


def named(row: Row, column: str, kind: Kind) -> list[str]:
    """The names in a row's label column.

    Raises:
        DataError: there is none, or it is of another kind.
    """
    value = value_of(row, column)
    if kind != "multi":
        return [_name(row, column, value)]
    if isinstance(value, str):
        # A CSV cell can hold a list only as JSON; what is none is the one label that holds.
        try:
            found = json.loads(value)
        except json.JSONDecodeError:
            found = None
        value = found if isinstance(found, list) else [value] if value else []
    if not isinstance(value, list):
        raise DataError(f"{row.origin} has {column} = {_short(value)}; expected a list of labels.")
    names = [_name(row, column, item) for item in value]
    if len(set(names)) != len(names):
        raise DataError(
            f"{row.origin} has {column} = {_short(value)}, a label twice; expected the names of the labels that hold, "
            "not a 0 or 1 for each."
        )
    return names


def number(row: Row, column: str) -> float:
    """The number in a row's label column.

    Raises:
        DataError: it is not a finite number.
    """
    value = value_of(row, column)
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except ValueError:
        found = float("nan")
    if not abs(found) < float("inf"):
        raise DataError(f"{row.origin} has {column} = {_short(value)}; expected a number.")
    return found


def value_of(row: Row, column: str) -> Any:
    """What stands in a column.

    Raises:
        DataError: nothing does.
    """
    value = row.values.get(column)
    if value is None:
        have = list(map(str, row.values))
        raise DataError(f"{row.origin} has no {column}; its columns are {listed(have)}.{nearest(column, have, most=1)}")
    return value


def _name(row: Row, column: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, int | str) or value == "":
        raise DataError(f"{row.origin} has {column} = {_short(value)}; expected a label: a name or a whole number.")
    return str(value)


def _kind(rows: Sequence[Row], options: TaskOptions, column: str) -> Kind:
    if options.problem != "auto":
        return options.problem
    values = [value_of(row, column) for row in rows]
    if any(isinstance(value, list) for value in values):
        return "multi"
    # Numbers in a CSV file are texts, and may be the names of classes: there a regression has to be asked for.
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        return "regression"
    return "single"


def _order(name: str) -> tuple[int, int, str]:
    """Whole numbers by their value and before all other names."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _weights(text: str | None, names: Sequence[str], counts: Mapping[str, int]) -> tuple[float, ...]:
    if text is None:
        return ()
    if text == BALANCED:
        missing = [name for name in names if not counts.get(name)]
        if missing:
            raise ConfigError(
                f"class_weights is {BALANCED}, and the training data has no example of {listed(missing)}; give numbers."
            )
        raw = {name: 1 / counts[name] for name in names}
    else:
        raw = _given_weights(text, names)
    mean = sum(raw[name] * counts.get(name, 0) for name in names) / sum(counts.get(name, 0) for name in names)
    return tuple(raw[name] / mean for name in names)


def _given_weights(text: str, names: Sequence[str]) -> dict[str, float]:
    found = dict.fromkeys(names, 1.0)
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.rpartition("="))
        if name not in found:
            raise ConfigError(
                f"class_weights is {text!r}; expected balanced, or numbers for labels as in {names[0]}=2,{names[1]}=1."
                f"{nearest(name or value, [BALANCED, *names])}"
            )
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = float("nan")
        if not 0 < found[name] < float("inf"):
            raise ConfigError(f"class_weights gives {name} {value!r}; expected a number above 0.")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
