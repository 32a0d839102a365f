"""Multiple choice, by an encoder with a head that scores each choice, or by a language model's likelihoods.

Shape legend: B rows, C choices of the row with most, S sequences of all rows, T tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.core.errors import ConfigError, DataError
from veneer.core.task_type import TaskType
from veneer.data.choices import COLUMNS, LETTERS, choice_of, encode_choices
from veneer.data.encode import IGNORED, Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.engine.head import language_loss
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import AbstractTask, BatchLoss, Goals, Piece, Prediction, Tally

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@final
@dataclass(frozen=True)
class Task(AbstractTask):
    """One of a row's choices is right, and the scores of all share the probability; a unit is a row.

    A language model scores a choice by the mean log-probability of its tokens behind the question.
    """

    likelihood: bool = False
    """Whether the model is a language model."""

    packs: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = COLUMNS

    @property
    def auto_class(self) -> str:  # type: ignore[override]
        return "AutoModelForCausalLM" if self.likelihood else "AutoModelForMultipleChoice"

    @property
    def task_type(self) -> TaskType:  # type: ignore[override]
        # A language model has no head of the task that would have to be trained.
        return TaskType.CAUSAL_LM if self.likelihood else TaskType.MULTIPLE_CHOICE

    @property
    def goals(self) -> Goals:
        return {"loss": "min", "accuracy": "max"}

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("multiple_choice")
        return self if config is None else self.described(config)

    def to_dict(self) -> dict[str, Any]:
        return {"likelihood": self.likelihood}

    def restored(self, values: Mapping[str, Any]) -> Task:
        return Task(bool(values["likelihood"]))

    def described(self, config: PretrainedConfig) -> Task:
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        )

        if config.model_type in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES:
            return Task()
        if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ConfigError(
                f"A model of type {config.model_type} has no head for multiple choice, and is no language model that "
                "could go on with a choice; use an encoder such as BERT, or a decoder such as Llama."
            )
        return Task(likelihood=True)

    def model_options(self) -> dict[str, Any]:
        return {}

    def check(self, row: Row, *, labelled: bool = True) -> None:
        choice_of(row, labelled=labelled)

    def prepare(self, rows: Iterable[Row], processor: Any) -> tuple[Any, list[str]]:
        first: dict[int, str] = {}
        for row in rows:
            with contextlib.suppress(DataError):
                first.setdefault(len(choice_of(row, labelled=False).choices), row.origin)
        if len(first) < 2:
            return processor, []
        each = " and ".join(f"{origin} has {count}" for count, origin in sorted(first.items()))
        return processor, [f"Rows have choices of unequal number: {each}."]

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
        asked = [choice_of(row, labelled=labelled) for row in rows]
        how: dict[str, Any] = {"max_length": max_length, "truncate": truncate}
        return encode_choices(rows, asked, processor, likelihood=self.likelihood, **how)

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        """``input_ids`` and the like (B, C, T); ``real`` (B, C), false where a row has fewer choices."""
        sizes = [example.more["sizes"] for example in examples]
        most, longest = max(map(len, sizes)), max(map(max, sizes))

        def laid_out(rows: Iterable[Sequence[int]], fill: int) -> Tensor:
            """(B, C, T); a choice that is not there is the row's first one, so that a model can attend to it."""
            found = []
            for row, counts in zip(rows, sizes, strict=True):
                parts = torch.tensor(row).split(counts)
                padded = [F.pad(part, (0, longest - len(part)), value=fill) for part in parts]
                found.append(torch.stack([*padded, *[padded[0]] * (most - len(padded))]))
            return torch.stack(found)

        filler = processor.pad_token_id if processor.pad_token_id is not None else 0
        batch = {
            "input_ids": laid_out((example.input_ids for example in examples), filler),
            "attention_mask": laid_out(([1] * len(example.input_ids) for example in examples), 0),
            "real": torch.tensor([[at < len(counts) for at in range(most)] for counts in sizes]),
        }
        if self.likelihood:
            batch["scored"] = laid_out(map(_scored, examples), 0)
        elif "token_type_ids" in examples[0].more:
            kinds = (example.more["token_type_ids"] for example in examples)
            batch["token_type_ids"] = laid_out(kinds, processor.pad_token_type_id)
        if examples[0].labels:
            batch["labels"] = torch.tensor([example.labels[0] for example in examples])
        return batch

    def units(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        scores = self._scores(model, batch).masked_fill(~batch["real"], -math.inf)
        truth = batch.get("labels")
        if truth is None:
            return BatchLoss(scores.new_zeros(()), Tally(), scores.detach())
        total = F.cross_entropy(scores, truth, reduction="sum")
        right = int((scores.argmax(-1) == truth).sum())
        return BatchLoss(total, Tally(float(total.detach()), len(truth), right), scores.detach())

    def _scores(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(B, C) float32."""
        if not self.likelihood:
            given = {key: value for key, value in batch.items() if key not in ("labels", "real")}
            logits: Tensor = model(**given).logits
            return logits.float()
        real = batch["real"]
        ids, mask, scored = (batch[name][real] for name in ("input_ids", "attention_mask", "scored"))
        labels = ids.masked_fill(scored == 0, IGNORED)
        losses = language_loss(model, {"input_ids": ids, "attention_mask": mask}, labels, reduction="none").total
        counts = (labels != IGNORED).sum(1)
        row = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
        means = -losses.new_zeros(len(ids)).index_add(0, row, losses) / counts
        return losses.new_zeros(real.shape).masked_scatter(real, means)

    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        found: list[Prediction] = []
        for example, row in zip(examples, outputs.softmax(-1).tolist(), strict=True):
            scores = row[: len(example.more["choices"])]
            best = scores.index(max(scores))
            text = example.more["choices"][best]
            found.append({"answer": text, "choice": best, "score": scores[best], "scores": scores})
        return found

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        if not tally.units:
            return dict.fromkeys(self.goals, math.nan)
        return {"loss": tally.loss / tally.units, "accuracy": tally.correct / tally.units}

    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        return {}

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        pieces: list[Piece] = []
        for at, ids in enumerate(torch.tensor(example.input_ids).split(example.more["sizes"])):
            text = processor.decode(ids.tolist(), skip_special_tokens=False)
            pieces.append(Piece(f"{LETTERS[at]}. {text}", trained=at == example.labels[0]))
            pieces.append(Piece("\n", trained=False))
        return pieces[:-1]


def _scored(example: Encoded) -> list[int]:
    """1 for each token of a choice, 0 for what comes before it; over all sequences."""
    sizes, own = example.more["sizes"], example.more["scored"]
    return [flag for size, count in zip(sizes, own, strict=True) for flag in [*[0] * (size - count), *[1] * count]]
