"""Causal language modelling: conversations, prompts with completions, instructions, plain text.

Shape legend: B sequences, T tokens, V vocabulary, P positions whose logits are needed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor, nn

from veneer.core.task_type import TaskType
from veneer.data.collate import collate
from veneer.data.encode import IGNORED, Encoded, EncodedSet, encode
from veneer.data.formats import recognise
from veneer.data.sources import Row
from veneer.data.templates import with_template
from veneer.tasks.task import AbstractTask, BatchLoss, Piece, Tally

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXP_LIMIT = 700.0  # exp() of more does not fit a float


@final
class Task(AbstractTask):
    """Each trained token is predicted from those before it; a unit is a trained token."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    task_type: ClassVar[TaskType] = TaskType.CAUSAL_LM

    def prepare(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedTokenizerBase, list[str]]:
        tokenizer, note = with_template(tokenizer, [sample.kind for sample in recognise(rows)])
        notes = [note] if note else []
        if tokenizer.eos_token_id is None:
            notes.append("The tokenizer has no eos token, so the end of a completion cannot be learned.")
        return tokenizer, notes

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int, train_on: str
    ) -> EncodedSet:
        return encode(recognise(rows), tokenizer, max_length=max_length, completions_only=train_on == "completion")

    def collate(self, examples: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        return collate(examples, pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)

    def units(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        targets_BT = batch["labels"][:, 1:]
        # Positions that no sequence of the batch is trained on need no logits: the head is much of a small model.
        needed_P = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits_BPV = model(**inputs, logits_to_keep=needed_P).logits
        else:
            logits_BPV = model(**inputs).logits[:, needed_P]
        targets_BP = targets_BT[:, needed_P]
        supervised = targets_BP != IGNORED
        logits_NV, targets_N = logits_BPV[supervised], targets_BP[supervised]
        total = nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        correct = int((logits_NV.detach().argmax(-1) == targets_N).sum())
        return BatchLoss(total, Tally(float(total.detach()), targets_N.numel(), correct))

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
