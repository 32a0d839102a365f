"""Image classification: a label, several labels, or a number for an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor, nn

from veneer.core.task_type import TaskType
from veneer.data import images, media
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.texts import report
from veneer.tasks import classes
from veneer.tasks.figures import GOALS, TOP5, check_installed
from veneer.tasks.labels import UNKNOWN, Labels, value_of
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import AbstractTask, BatchLoss, Goals, Piece, Prediction, Tally

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COLUMN = "label"


@final
@dataclass(frozen=True)
class Task(AbstractTask):
    """The head's outputs are compared with the row's label; a unit is an image."""

    labels: Labels = UNKNOWN
    channels: int = 3
    """1 for a model of grey images."""

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    task_type: ClassVar[TaskType] = TaskType.IMAGE_CLASSIFICATION
    packs: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = (*images.COLUMNS, COLUMN)
    keeps: ClassVar[bool] = False

    @property
    def goals(self) -> Goals:
        return {"loss": "min", **GOALS[self.labels.kind], **(TOP5 if classes.has_top5(self.labels) else {})}

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("image_classification", "labels", "problem", "class_weights")
        check_installed()
        images.check_installed()
        return Task(Labels.of(rows, options, COLUMN), _channels(config))

    def to_dict(self) -> dict[str, Any]:
        return {**self.labels.to_dict(), "channels": self.channels}

    def restored(self, values: Mapping[str, Any]) -> Task:
        return Task(Labels.restored(values), int(values["channels"]))

    def described(self, config: PretrainedConfig) -> Task:
        return Task(Labels.described(config), _channels(config))

    def model_options(self) -> dict[str, Any]:
        return self.labels.model_options()

    def check(self, row: Row, *, labelled: bool = True) -> None:
        images.image_file(row)
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
        found = tuple(
            images.encode_image(row, self.labels.ids(row, COLUMN) if labelled else [], self.channels) for row in rows
        )
        return EncodedSet(found, report(rows, found, cut=(), dropped=0))

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        batch = images.pixels(examples, processor, self.channels)
        return {**batch, "labels": self.labels.tensor(e.labels for e in examples)} if examples[0].labels else batch

    def units(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        return classes.loss(self.labels, logits, batch.get("labels"))

    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        return classes.predictions(self.labels, outputs)

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        found = classes.metrics(self.labels, tally, predictions, examples)
        return {**found, **classes.top5(self.labels, predictions, examples)}

    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        return classes.details(self.labels, predictions, examples)

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        file = media.named(example.more["file"])
        return [Piece(file, trained=False), Piece(classes.told(self.labels, example.labels), trained=True)]


def _channels(config: PretrainedConfig | None) -> int:
    return 1 if getattr(config, "num_channels", 3) == 1 else 3
