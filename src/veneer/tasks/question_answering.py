"""Question answering by spans: where in a text the answer stands, or that it has none (SQuAD 1 and 2).

Shape legend: B windows, T tokens, L tokens of a window's text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.core.errors import ConfigError
from veneer.core.task_type import TaskType
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.spans import COLUMNS, encode_spans, nowhere_in, question_of
from veneer.data.texts import pad
from veneer.tasks.figures import check_installed
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import AbstractWindows, BatchLoss, Goals, Piece, Prediction, Tally, windows_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_SPANS = 20
"""The spans of a window, and of all windows of a row, that share the probability."""
MOST_TOKENS = 30
"""The tokens of the longest answer."""
_SIDES = ("start_positions", "end_positions")


@final
@dataclass(frozen=True)
class Task(AbstractWindows):
    """The first and the last token of the answer are told; a unit is a window of a row's context."""

    stride: int = TaskOptions.stride
    unanswerable: bool = True
    """Whether there may be no answer: whether training data has such rows."""

    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    task_type: ClassVar[TaskType] = TaskType.QUESTION_ANSWERING
    packs: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = COLUMNS

    @property
    def goals(self) -> Goals:
        return {"loss": "min", "exact_match": "max", "f1": "max"}

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("question_answering", "stride")
        check_installed("torchmetrics")
        return Task(options.stride, unanswerable=any(not question_of(row).answers for row in rows))

    def to_dict(self) -> dict[str, Any]:
        return {"stride": self.stride, "unanswerable": self.unanswerable}

    def restored(self, values: Mapping[str, Any]) -> Task:
        return Task(int(values["stride"]), bool(values["unanswerable"]))

    def described(self, config: PretrainedConfig) -> Task:
        return self

    def model_options(self) -> dict[str, Any]:
        # The two outputs are the first and the last token, whatever the model's head told before.
        return {"num_labels": 2}

    def check(self, row: Row, *, labelled: bool = True) -> None:
        question_of(row, labelled=labelled)

    def prepare(self, rows: Iterable[Row], processor: Any) -> tuple[Any, list[str]]:
        if not processor.is_fast:
            raise ConfigError(
                f"{type(processor).__name__} does not say where in a text a token stands; expected a fast tokenizer."
            )
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
        questions = [question_of(row, labelled=labelled) for row in rows]
        return encode_spans(rows, questions, processor, max_length=max_length, stride=self.stride, truncate=truncate)

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        batch = pad(examples, processor)
        if not examples[0].labels:
            return batch
        places = torch.tensor([example.labels for example in examples])
        return {**batch, **dict(zip(_SIDES, places.unbind(1), strict=True))}

    def units(self, batch: dict[str, Tensor]) -> int:
        return len(batch["input_ids"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        given = model(**{key: value for key, value in batch.items() if key not in _SIDES})
        logits = torch.stack([given.start_logits, given.end_logits], dim=1).float()
        if _SIDES[0] not in batch:
            return BatchLoss(logits.new_zeros(()), Tally(), logits.detach())
        truth = torch.stack([batch[side] for side in _SIDES], dim=1)
        total = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="sum") / 2
        right = int((logits.argmax(-1) == truth).all(-1).sum())
        return BatchLoss(total, Tally(float(total.detach()), len(truth), right), logits.detach())

    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        return [_spans(logits, example, processor) for logits, example in zip(outputs.cpu(), examples, strict=True)]

    def join(self, readings: Sequence[Prediction]) -> Prediction:
        best: dict[tuple[int, str], float] = {}
        for span in (span for reading in readings for span in reading["spans"]):
            # What two windows have in common is one span.
            place = span["start"], span["text"]
            best[place] = max(span["logit"], best.get(place, -math.inf))
        spans = sorted(best.items(), key=lambda item: -item[1])[:MOST_SPANS]
        nothing = min(reading["nothing"] for reading in readings)
        logits = [logit for _, logit in spans]
        scores = torch.tensor([nothing if self.unanswerable or not spans else -math.inf, *logits]).softmax(0).tolist()
        found: Prediction = {"text": "", "start": None, "score": scores[0]}
        if spans and not (self.unanswerable and nothing > logits[0]):
            (start, text), _ = spans[0]
            found = {"text": text, "start": start, "score": scores[1]}
        return {**found, "no_answer": scores[0]} if self.unanswerable else found

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        loss = tally.loss / tally.units if tally.units else math.nan
        return {"loss": loss, **_figures(self._answered(predictions, examples))}

    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        answered = self._answered(predictions, examples)
        kinds = {
            "answerable": [each for each in answered if each[1]],
            "unanswerable": [each for each in answered if not each[1]],
        }
        if not all(kinds.values()):
            return {}
        return {kind: {**_figures(some), "examples": len(some)} for kind, some in kinds.items()}

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        first, offsets, text = example.more["first"], example.more["offsets"], example.more["text"]
        asked = processor.decode(example.input_ids[:first], skip_special_tokens=False)
        if example.labels[0] < first:
            return [Piece(f"{asked} {text}", trained=False), Piece(" no answer", trained=True)]
        start, end = offsets[example.labels[0] - first][0], offsets[example.labels[1] - first][1]
        pieces = [
            Piece(f"{asked} {text[:start]}", trained=False),
            Piece(text[start:end], trained=True),
            Piece(text[end:], trained=False),
        ]
        return [piece for piece in pieces if piece.text]

    def _answered(
        self, predictions: Sequence[Prediction], examples: Sequence[Encoded]
    ) -> list[tuple[str, Sequence[str]]]:
        """The answer to each row's question, and those that are right."""
        return [
            (self.join([predictions[at] for at in places])["text"], examples[places[0]].more["answers"])
            for places in windows_of(examples)
        ]


def _spans(logits: Tensor, example: Encoded, processor: Any) -> Prediction:
    """The best spans of a window, and how likely it has none.

    Args:
        logits: (2, T), of being the first and the last token.
        example: the window.
        processor: the tokenizer.
    """
    first, offsets = example.more["first"], example.more["offsets"]
    starts, ends = logits[:, first : first + len(offsets)]
    width = min(MOST_TOKENS, len(offsets))
    # From each first token to each last one that is near enough, (L, width).
    sums = starts[:, None] + F.pad(ends, (0, width - 1), value=-math.inf).unfold(0, width, 1)
    values, places = sums.flatten().topk(min(MOST_SPANS, sums.numel()))
    spans = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value == -math.inf:
            break
        begin, end = offsets[place // width][0], offsets[place // width + place % width][1]
        text = example.more["text"][begin:end]
        # Some tokenizers count the space before a word to it.
        begin += len(text) - len(text.lstrip())
        if text.strip():
            spans.append({"text": text.strip(), "start": example.more["at"] + begin, "logit": value})
    nothing = float(logits[:, nowhere_in(example.input_ids, processor)].sum())
    return {"spans": spans, "nothing": nothing}


def _figures(answered: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """SQuAD's exact match and F1, as shares; an answer is compared with the one of those it is nearest to."""
    if not answered:
        return {"exact_match": math.nan, "f1": math.nan}
    from torchmetrics.functional.text.squad import squad

    said = [{"id": str(at), "prediction_text": text} for at, (text, _) in enumerate(answered)]
    right = [{"id": str(at), "answers": {"text": list(texts) or [""]}} for at, (_, texts) in enumerate(answered)]
    found = squad(said, right)  # type: ignore[arg-type]
    return {name: float(found[name]) / 100 for name in ("exact_match", "f1")}
