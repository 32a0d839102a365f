"""Sequence to sequence: a text from a text by an encoder-decoder, as in summaries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor, nn

from veneer.core.task_type import TaskType
from veneer.data.encode import IGNORED, Encoded, EncodedSet, Truncation
from veneer.data.pairs import COLUMNS, encode_pairs, pair
from veneer.data.rows import Row
from veneer.data.texts import pad
from veneer.tasks import decoding
from veneer.tasks.judges import Judges
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import BatchLoss, Goals, Piece, Prediction, Tally
from veneer.tasks.writing import AbstractWriter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CUSTOMARY = Judges(("rouge1", "rouge2", "rougeL"))


@final
@dataclass(frozen=True)
class Task(AbstractWriter):
    """The decoder writes the target after the encoder has read the source; a unit is a token of a target."""

    prefix: str = ""
    judges: Judges = _CUSTOMARY

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    task_type: ClassVar[TaskType] = TaskType.SEQ_2_SEQ_LM
    packs: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = COLUMNS

    @property
    def goals(self) -> Goals:
        return decoding.GOALS

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("seq2seq_lm", "prefix", "judge_by", "database")
        return Task(options.prefix or "", self.judges.asked(options))

    def judged_by(self, judges: Judges) -> Task:
        return replace(self, judges=judges)

    def to_dict(self) -> dict[str, Any]:
        return {"prefix": self.prefix, **self.judges.to_dict()}

    def restored(self, values: Mapping[str, Any]) -> Task:
        return Task(str(values["prefix"]), Judges.restored(values))

    def described(self, config: PretrainedConfig) -> Task:
        return self

    def model_options(self) -> dict[str, Any]:
        return {}

    def check(self, row: Row, *, labelled: bool = True) -> None:
        pair(row, labelled=labelled)

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
        found = [pair(row) for row in rows]
        pairs = [(f"{self.prefix}{source}", str(target)) for source, target in found]
        return encode_pairs(rows, pairs, processor, max_length=max_length, truncate=truncate)

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        return {**pad(examples, processor), "labels": decoding.targets(examples)}

    def units(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "token_type_ids")}
        return decoding.loss(model, inputs, batch["labels"])

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        return decoding.metrics(tally)

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        source = processor.decode(example.input_ids, skip_special_tokens=False)
        return [Piece(f"{source}\n", trained=False), Piece(processor.decode(example.labels), trained=True)]

    def ask(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[Encoded]:
        return decoding.asked(rows, [pair(row, labelled=False) for row in rows], processor, self.prefix, max_length)

    def given(self, examples: Sequence[Encoded], processor: Any) -> dict[str, Tensor]:
        return {key: value for key, value in pad(examples, processor).items() if key != "token_type_ids"}

    def generation(self, processor: Any) -> dict[str, Any]:
        return {}
