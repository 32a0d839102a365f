"""Causal language modelling: conversations, prompts with completions, instructions, plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, Literal, final

from torch import Tensor, nn

from veneer.core.task_type import TaskType
from veneer.data.collate import collate
from veneer.data.encode import IGNORED, Encoded, EncodedSet, Truncation, encode
from veneer.data.formats import kinds, recognise
from veneer.data.sources import Row
from veneer.data.templates import with_template
from veneer.engine.head import language_loss
from veneer.tasks.task import AbstractTask, BatchLoss, Piece, Tally

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXP_LIMIT = 700.0  # exp() of more does not fit a float


@final
class Task(AbstractTask):
    """Each trained token is predicted from those before it; a unit is a trained token."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    task_type: ClassVar[TaskType] = TaskType.CAUSAL_LM
    packs: ClassVar[bool] = True
    goals: ClassVar[Mapping[str, Literal["min", "max"]]] = {"loss": "min", "perplexity": "min", "token_accuracy": "max"}

    def prepare(
        self, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedTokenizerBase, list[str]]:
        tokenizer, note = with_template(tokenizer, kinds(rows))
        notes = [note] if note else []
        if tokenizer.eos_token_id is None:
            notes.append("The tokenizer has no eos token, so the end of a completion cannot be learned.")
        return tokenizer, notes

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        train_on: str,
        truncate: Truncation = "end",
    ) -> EncodedSet:
        only = train_on == "completion"
        return encode(recognise(rows), tokenizer, max_length=max_length, completions_only=only, truncate=truncate)

    def collate(
        self, examples: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, *, packed: bool = False
    ) -> dict[str, Tensor]:
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return collate(examples, pad_id=pad_id, packed=packed)

    def units(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        found = language_loss(model, inputs, batch["labels"])
        return BatchLoss(found.total, Tally(float(found.total.detach()), found.units, found.correct))

    def metrics(self, tally: Tally) -> dict[str, float]:
        loss = tally.loss / tally.units if tally.units else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < _EXP_LIMIT else math.inf,
            "token_accuracy": tally.correct / tally.units if tally.units else math.nan,
        }

    def preview(self, example: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        pieces: list[Piece] = []
        shown = ""
        end = 0
        for trained, group in groupby(example.labels, key=lambda label: label != IGNORED):
            start, end = end, end + len(list(group))
            upto = _decoded(tokenizer, example.input_ids[:end])
            # Decoded from the start, a stretch keeps its leading space; cut through a character, it stands alone.
            whole = upto.startswith(shown)
            pieces.append(
                Piece(upto[len(shown) :] if whole else _decoded(tokenizer, example.input_ids[start:end]), trained)
            )
            shown = upto
        return pieces


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
