"""Sequence classification: a label, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor, nn

from veneer.core.task_type import TaskType
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.texts import encode_texts, pad, text_of
from veneer.tasks import classes
from veneer.tasks.figures import GOALS, check_installed
from veneer.tasks.labels import UNKNOWN, Labels, value_of
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import AbstractTask, BatchLoss, Goals, Piece, Prediction, Tally

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COLUMN = "label"
_TEXT, _PAIR = "text", "text_pair"


@final
@dataclass(frozen=True)
class Task(AbstractTask):
    """The head's outputs are compared with the row's label; a unit is an example."""

    labels: Labels = UNKNOWN

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    task_type: ClassVar[TaskType] = TaskType.SEQ_CLS
    packs: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = (_TEXT, _PAIR, COLUMN)

    @property
    def goals(self) -> Goals:
        return {"loss": "min", **GOALS[self.labels.kind]}

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("seq_cls", "labels", "problem", "class_weights")
        check_installed()
        return Task(Labels.of(rows, options, COLUMN))

    def to_dict(self) -> dict[str, Any]:
        return self.labels.to_dict()

    def restored(self, values: Mapping[str, Any]) -> Task:
        return Task(Labels.restored(values))

    def described(self, config: PretrainedConfig) -> Task:
        return Task(Labels.described(config))

    def model_options(self) -> dict[str, Any]:
        return self.labels.model_options()

    def check(self, row: Row, *, labelled: bool = True) -> None:
        text_of(row, _TEXT)
        _pair(row)
        if labelled:
            value_of(row, COLUMN)

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
        texts = [(text_of(row, _TEXT), _pair(row)) for row in rows]
        ids = [self.labels.ids(row, COLUMN) if labelled else [] for row in rows]
        return encode_texts(
            rows, texts, processor, lambda number, _: (ids[number], {}), max_length=max_length, truncate=truncate
        )

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        batch = pad(examples, processor)
        return {**batch, "labels": self.labels.tensor(e.labels for e in examples)} if examples[0].labels else batch

    def units(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        return classes.loss(self.labels, logits, batch.get("labels"))

    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        return classes.predictions(self.labels, outputs)

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        return classes.metrics(self.labels, tally, predictions, examples)

    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        return classes.details(self.labels, predictions, examples)

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        text = processor.decode(example.input_ids, skip_special_tokens=False)
        return [Piece(text, trained=False), Piece(classes.told(self.labels, example.labels), trained=True)]


def _pair(row: Row) -> str | None:
    return text_of(row, _PAIR) if row.values.get(_PAIR) is not None else None
