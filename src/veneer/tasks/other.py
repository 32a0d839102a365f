"""A task of the user's own: a Python file with a model and a loss (see ``program``); a unit is an example.

Shape legend: B examples.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn

from veneer.core.errors import CodeError, ConfigError, DataError, UsageError, listed
from veneer.core.task_type import TaskType
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.texts import report
from veneer.tasks.options import TaskOptions
from veneer.tasks.program import Program
from veneer.tasks.task import AbstractTask, BatchLoss, Goals, Piece, Prediction, Tally

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_UNITS = "veneer_units"
"""The key of a batch under which each example is 1, or 0 where it is only to be predicted: (B,) int64."""


@final
@dataclass(frozen=True)
class Task(AbstractTask):
    """What the file says."""

    program: Program | None = None  # type: ignore[misc]
    trained_with: tuple[str, str] | None = None
    """The name of the file that weights were trained with, and its hash."""

    auto_class: ClassVar[str] = "AutoModel"
    task_type: ClassVar[TaskType] = TaskType.OTHER
    packs: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[bool] = False
    pretrained: ClassVar[bool] = False

    @property
    def code(self) -> Program:
        """The file.

        Raises:
            UsageError: it was not named.
        """
        if self.program is None:
            before = f" It was {self.trained_with[0]} when the weights were trained." if self.trained_with else ""
            raise UsageError(
                f"Task other is code of your own, which is run when you name it: give --code my_task.py.{before}"
            )
        return self.program

    @property
    def goals(self) -> Goals:
        return {"loss": "min", **self.code.metrics}

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("other", "code")
        return coded(self, options.code)

    def to_dict(self) -> dict[str, Any]:
        return {"code": self.code.path.name, "sha256": self.code.sha256}

    def restored(self, values: Mapping[str, Any]) -> Task:
        return Task(None, (str(values["code"]), str(values["sha256"])))

    def described(self, config: PretrainedConfig) -> Task:
        return self

    def model_options(self) -> dict[str, Any]:
        return {}

    def check(self, row: Row, *, labelled: bool = True) -> None:
        """Nothing: ``encode`` tells."""

    def prepare(self, rows: Iterable[Row], processor: Any) -> tuple[Any, list[str]]:
        return processor, []

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        *,
        max_length: int,
        train_on: str,
        truncate: Truncation = "end",
        labelled: bool = True,
    ) -> EncodedSet:
        examples = [
            Encoded(row.origin, [], [1] if labelled else [], {"example": self._example(row, processor)}) for row in rows
        ]
        return EncodedSet(tuple(examples), report(rows, examples, cut=[], dropped=0))

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        about = f" on {listed(example.origin for example in examples)}"
        batch = self.code.call("collate", [example.more["example"] for example in examples], processor, about=about)
        if not isinstance(batch, dict) or not all(isinstance(value, Tensor) for value in batch.values()):
            raise self.code.expected("collate", batch, "a dict of tensors", about)
        return {_UNITS: torch.tensor([len(example.labels) for example in examples]), **batch}

    def units(self, batch: dict[str, Tensor]) -> int:
        return int(batch[_UNITS].sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        inputs = {key: value for key, value in batch.items() if key != _UNITS}
        count = len(batch[_UNITS])
        if not self.units(batch):
            return BatchLoss(torch.zeros(()), Tally(), self._predicted(model, inputs, count))
        each_B = self.code.call("loss", model, inputs)
        if not isinstance(each_B, Tensor) or each_B.shape != (count,):
            raise self.code.expected("loss", each_B, f"a tensor with the loss of each of {count} examples, ({count},)")
        if torch.is_grad_enabled() and not each_B.requires_grad:
            raise CodeError(f"loss in {self.code.path.name} gave a tensor from which no gradient leads to the model.")
        total = each_B.float().sum()
        measured = not torch.is_grad_enabled() and bool(self.code.metrics)
        said = self._predicted(model, inputs, count) if measured else None
        return BatchLoss(total, Tally(float(total.detach()), count), said)

    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        return outputs if outputs is not None else []

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        mean = tally.loss / tally.units if tally.units else math.nan
        if not self.code.metrics:
            return {"loss": mean}
        if not predictions:
            return {"loss": mean, **dict.fromkeys(self.code.metrics, math.nan)}
        found = self.code.call("metrics", list(predictions), [example.more["example"] for example in examples])
        if not isinstance(found, dict) or set(found) != set(self.code.metrics):
            names = listed(map(str, found)) if isinstance(found, dict) else type(found).__name__
            raise CodeError(f"metrics in {self.code.path.name} gave {names}; METRICS has {listed(self.code.metrics)}.")
        return {"loss": mean, **{name: float(found[name]) for name in self.code.metrics}}

    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        return {}

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        text = json.dumps(example.more["example"], ensure_ascii=False)
        return [Piece(text if len(text) <= 500 else f"{text[:497]}...", trained=True)]

    def _example(self, row: Row, processor: Any) -> dict[str, Any]:
        about = f" on {row.origin}"
        try:
            values = dict(row.values)
            found = self.code.call("encode", values, processor, about=about) if self.code.has("encode") else values
            if not isinstance(found, dict):
                raise self.code.expected("encode", found, "a dict", about)
            json.dumps(found)
        except CodeError as error:
            # Of a row, so that a run can pass it over.
            raise DataError(str(error)) from error.__cause__
        except (TypeError, ValueError) as error:
            raise DataError(f"{row.origin} is no example that JSON can hold: {error}.") from error
        return found

    def _predicted(self, model: nn.Module, inputs: dict[str, Tensor], count: int) -> list[Prediction]:
        if not self.code.has("predict"):
            raise UsageError(f"{self.code.path.name} has no predict(model, batch), so that it cannot predict.")
        found = self.code.call("predict", model, inputs)
        if not isinstance(found, list) or len(found) != count or not all(isinstance(one, dict) for one in found):
            raise self.code.expected("predict", found, f"a list of {count} dicts, one for each example")
        return found


def coded(task: AbstractTask, code: str | None) -> Any:
    """A task with the file that its user names; where weights were trained with another, a warning says so.

    Raises:
        ConfigError: the task has no code.
        UsageError: no file is named, or it is not there.
        CodeError: it fails, or lacks a function.
    """
    if not isinstance(task, Task):
        if code is not None:
            raise ConfigError("code has no meaning for this task; it is for task other.")
        return task
    found = Task(Program(code) if code is not None else task.program, task.trained_with)
    if found.trained_with is not None and found.trained_with[1] != found.code.sha256:
        warnings.warn(
            f"{found.code.path.name} is not as it was when the weights were trained with {found.trained_with[0]}.",
            stacklevel=2,
        )
    found.code  # noqa: B018
    return found
