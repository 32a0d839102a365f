"""Image classification: a label, several labels, or a number for an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor

from veneer.core.task_type import TaskType
from veneer.data import images, media
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.texts import report
from veneer.tasks.classes import COLUMN, AbstractClassifier
from veneer.tasks.figures import check_installed
from veneer.tasks.labels import Labels
from veneer.tasks.options import TaskOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@final
@dataclass(frozen=True)
class Task(AbstractClassifier):
    """The label of an image."""

    channels: int = 3
    """1 for a model of grey images."""

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    task_type: ClassVar[TaskType] = TaskType.IMAGE_CLASSIFICATION
    columns: ClassVar[tuple[str, ...]] = (*images.COLUMNS, COLUMN)
    keeps: ClassVar[bool] = False
    top5: ClassVar[bool] = True

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("image_classification", "labels", "problem", "class_weights")
        check_installed()
        images.check_installed()
        return Task(Labels.of(rows, options, COLUMN), _channels(config))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "channels": self.channels}

    def restored(self, values: Mapping[str, Any]) -> Task:
        return Task(Labels.restored(values), int(values["channels"]))

    def described(self, config: PretrainedConfig) -> Task:
        return Task(Labels.described(config), _channels(config))

    def seen(self, row: Row) -> str:
        return images.image_file(row)

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
        found = tuple(images.encode_image(row, self.ids(row, labelled=labelled), self.channels) for row in rows)
        return EncodedSet(found, report(rows, found, cut=(), dropped=0))

    def inputs(self, examples: Sequence[Encoded], processor: Any) -> dict[str, Tensor]:
        return images.pixels(examples, processor, self.channels)

    def told(self, example: Encoded, processor: Any) -> str:
        return media.named(example.more["file"])


def _channels(config: PretrainedConfig | None) -> int:
    return 1 if getattr(config, "num_channels", 3) == 1 else 3
