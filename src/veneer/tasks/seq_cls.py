"""Sequence classification: a label, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor

from veneer.core.task_type import TaskType
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.texts import encode_texts, pad, text_of
from veneer.tasks.classes import COLUMN, AbstractClassifier
from veneer.tasks.figures import check_installed
from veneer.tasks.labels import Labels
from veneer.tasks.options import TaskOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TEXT, _PAIR = "text", "text_pair"


@final
@dataclass(frozen=True)
class Task(AbstractClassifier):
    """The label of a text, or of two."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    task_type: ClassVar[TaskType] = TaskType.SEQ_CLS
    columns: ClassVar[tuple[str, ...]] = (_TEXT, _PAIR, COLUMN)

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("seq_cls", "labels", "problem", "class_weights")
        check_installed()
        return Task(Labels.of(rows, options, COLUMN))

    def described(self, config: PretrainedConfig) -> Task:
        return Task(Labels.described(config))

    def seen(self, row: Row) -> tuple[str, str | None]:
        return text_of(row, _TEXT), text_of(row, _PAIR) if row.values.get(_PAIR) is not None else None

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
        texts = [self.seen(row) for row in rows]
        ids = [self.ids(row, labelled=labelled) for row in rows]
        return encode_texts(
            rows, texts, processor, lambda number, _: (ids[number], {}), max_length=max_length, truncate=truncate
        )

    def inputs(self, examples: Sequence[Encoded], processor: Any) -> dict[str, Tensor]:
        return pad(examples, processor)

    def told(self, example: Encoded, processor: Any) -> str:
        text: str = processor.decode(example.input_ids, skip_special_tokens=False)
        return text
