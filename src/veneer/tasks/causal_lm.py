"""Causal language modelling: conversations, prompts with completions, instructions, plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch import Tensor, nn

from veneer.core.errors import DataError
from veneer.core.task_type import TaskType
from veneer.data.collate import collate
from veneer.data.encode import IGNORED, Encoded, EncodedSet, Truncation, encode
from veneer.data.formats import COLUMNS, kinds, question, recognise
from veneer.data.prompts import pad_left, prompt
from veneer.data.rows import Row
from veneer.data.templates import with_template
from veneer.engine.head import language_loss
from veneer.tasks import decoding
from veneer.tasks.judges import Judges
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import BatchLoss, Goals, Piece, Prediction, Tally
from veneer.tasks.writing import AbstractWriter

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CUSTOMARY = Judges(("exact_match",))


@final
@dataclass(frozen=True)
class Task(AbstractWriter):
    """Each trained token is predicted from those before it; a unit is a trained token."""

    judges: Judges = _CUSTOMARY

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    task_type: ClassVar[TaskType] = TaskType.CAUSAL_LM
    packs: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = COLUMNS

    @property
    def goals(self) -> Goals:
        return decoding.GOALS

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("causal_lm", "judge_by", "database")
        return Task(self.judges.asked(options))

    def judged_by(self, judges: Judges) -> Task:
        return replace(self, judges=judges)

    def to_dict(self) -> dict[str, Any]:
        return self.judges.to_dict()

    def restored(self, values: Mapping[str, Any]) -> Task:
        return Task(Judges.restored(values))

    def described(self, config: PretrainedConfig) -> Task:
        return self

    def model_options(self) -> dict[str, Any]:
        return {}

    def check(self, row: Row, *, labelled: bool = True) -> None:
        if labelled:
            recognise([row])
        else:
            question(row)

    def prepare(self, rows: Iterable[Row], processor: Any) -> tuple[Any, list[str]]:
        tokenizer, note = with_template(processor, kinds(rows))
        notes = [note] if note else []
        if tokenizer.eos_token_id is None:
            notes.append("The tokenizer has no eos token, so the end of a completion cannot be learned.")
        return tokenizer, notes

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
        only = train_on == "completion"
        return encode(recognise(rows), processor, max_length=max_length, completions_only=only, truncate=truncate)

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        pad_id = processor.pad_token_id if processor.pad_token_id is not None else 0
        return collate(examples, pad_id=pad_id, packed=packed)

    def units(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        found = language_loss(model, inputs, batch["labels"])
        return BatchLoss(found.total, Tally(float(found.total.detach()), found.units, found.correct))

    def ask(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[Encoded]:
        found = []
        for row in rows:
            sample, reference = question(row)
            ids, asked = prompt(sample, processor)
            if len(ids) > max_length:
                raise DataError(f"{row.origin} asks with {len(ids):,} tokens, and at most {max_length:,} are taken.")
            found.append(Encoded(row.origin, ids, [], {"asked": asked, "reference": reference}))
        return found

    def given(self, examples: Sequence[Encoded], processor: Any) -> dict[str, Tensor]:
        pad_id = processor.pad_token_id if processor.pad_token_id is not None else 0
        return pad_left([example.input_ids for example in examples], pad_id)

    def generation(self, processor: Any) -> dict[str, Any]:
        return {}

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        return decoding.metrics(tally)

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        pieces: list[Piece] = []
        shown = ""
        end = 0
        for trained, group in groupby(example.labels, key=lambda label: label != IGNORED):
            start, end = end, end + len(list(group))
            upto = _decoded(processor, example.input_ids[:end])
            # Decoded from the start, a stretch keeps its leading space; cut through a character, it stands alone.
            whole = upto.startswith(shown)
            pieces.append(
                Piece(upto[len(shown) :] if whole else _decoded(processor, example.input_ids[start:end]), trained)
            )
            shown = upto
        return pieces


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
