"""Feature extraction: a vector for a text, near those of texts that belong to it.

The data says what belongs together:

- ``anchor``, ``positive`` and, where there is one, ``negative``: each anchor is to be nearest to its own positive,
  among the positives and negatives of all anchors that go through the model at once (in-batch negatives, arXiv
  1705.00652). Batches that accumulate to one step, and other processes, add none.
- ``text``, ``text_pair``, ``score``: the cosine of the two is to be the score, by the squared error. That is a loss of
  each pair by itself, so that batches of any size add up to the same; one of the order of pairs would not.

What is measured does not depend on batches: anchors look for their positive among all texts that are held out, and the
loss is that of all of them as one batch.

Shape legend: N texts, B examples, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.core.errors import ConfigError, DataError, listed
from veneer.core.task_type import TaskType
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.texts import encode_texts, pad, report, text_of
from veneer.tasks.embeddings import Way, compared, numbered, pooled, ranking, way_of
from veneer.tasks.figures import NUMBER, check_installed, figures
from veneer.tasks.labels import Labels, number
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import AbstractTask, BatchLoss, Goals, Piece, Prediction, Tally

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Kind = Literal["contrast", "score"]

_CONTRAST, _SCORE = ("anchor", "positive", "negative"), ("text", "text_pair")
_RANKS: Goals = {"recall_at_1": "max", "recall_at_10": "max", "mrr": "max"}


@final
@dataclass(frozen=True)
class Task(AbstractTask):
    """A unit is an anchor, or a pair with its score."""

    kind: Kind | None = None
    """What the data says of texts; None goes by each row."""
    way: Way = "mean"
    span: tuple[float, float] | None = None
    """The scores that cosines of 0 and 1 stand for; None takes the least and greatest of what is measured."""

    auto_class: ClassVar[str] = "AutoModel"
    task_type: ClassVar[TaskType] = TaskType.FEATURE_EXTRACTION
    packs: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = (*_CONTRAST, *_SCORE, "score")

    @property
    def least(self) -> int:  # type: ignore[override]
        return 2 if self.kind == "contrast" else 1

    @property
    def goals(self) -> Goals:
        return {"loss": "min", **(NUMBER if self.kind == "score" else _RANKS)}

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("feature_extraction", "pooling")
        way = way_of(config) if options.pooling == "auto" else options.pooling
        if config is not None and config.is_encoder_decoder:
            raise ConfigError("An encoder-decoder has no one vector for each token of a text; use an encoder.")
        each = iter(rows)
        first = next(each, None)
        kind = _kind(first) if first is not None else None
        if first is None or kind == "contrast":
            return Task(kind, way)
        check_installed()
        return Task(kind, way, _span([number(row, "score") for row in chain([first], each)]))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "pooling": self.way, "span": list(self.span) if self.span else None}

    def restored(self, values: Mapping[str, Any]) -> Task:
        kind, way, span = values["kind"], values["pooling"], values["span"]
        if kind not in (None, *get_args(Kind)) or way not in get_args(Way):
            raise ValueError("expected kind and pooling")
        return Task(kind, way, (float(span[0]), float(span[1])) if span else None)

    def described(self, config: PretrainedConfig) -> Task:
        return Task(way=way_of(config))

    def model_options(self) -> dict[str, Any]:
        return {}

    def check(self, row: Row, *, labelled: bool = True) -> None:
        self._read(row, labelled=labelled)

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
        examples, cut, dropped = [], [], 0
        for row in rows:
            texts, labels = self._read(row, labelled=labelled)
            found = encode_texts(
                [row] * len(texts),
                [(text, None) for text in texts.values()],
                processor,
                lambda _, tokens: ((), {}),
                max_length=max_length,
                truncate=truncate,
            )
            dropped += found.report.dropped > 0
            cut += [found.report.tokens_cut] if found.report.truncated else []
            if not found.report.dropped:
                examples.append(_joined(row, list(texts), labels, found.examples))
        return EncodedSet(tuple(examples), report(rows, examples, cut=cut, dropped=dropped))

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        """All first texts, then all second ones, then all third ones, (N, T), ``place`` (N,) says which; with the
        wanted cosines as ``labels`` (B,), and a number for what each text says as ``said`` (N,)."""
        texts = [(at, text) for at in range(len(_CONTRAST)) for e in examples for text in _texts(e)[at : at + 1]]
        batch = pad([text for _, text in texts], processor)
        batch["place"] = torch.tensor([at for at, _ in texts])
        batch["said"] = numbered((tuple(text.input_ids) for _, text in texts), {})
        if examples[0].labels:
            batch["labels"] = _scaled([e.labels[0] for e in examples], self.span or (0.0, 1.0))
        return batch

    def units(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        inputs = {key: value for key, value in batch.items() if key not in ("place", "said", "labels")}
        states = model(**inputs).last_hidden_state.float()
        vectors_ND = pooled(states, batch["attention_mask"], self.way)
        wanted = batch.get("labels")
        if wanted is None:
            return BatchLoss(vectors_ND.new_zeros(()), Tally(), vectors_ND.detach())
        first = batch["place"] == 0
        correct = 0
        if self.kind == "score":
            total = F.mse_loss(_cosines(vectors_ND[first], vectors_ND[~first]), wanted, reduction="sum")
        else:
            said = batch["said"]
            near = compared(vectors_ND[first], vectors_ND[~first], said[first], said[~first], 0)
            right = torch.arange(len(near), device=near.device)
            total = F.cross_entropy(near, right, reduction="sum")
            correct = int((near.argmax(-1) == right).sum())
        return BatchLoss(total, Tally(float(total.detach()), len(wanted), correct), vectors_ND.detach())

    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        """The vector of each text: as a tensor where it is to be measured by, else as numbers."""
        found: list[dict[str, Tensor]] = [{} for _ in examples]
        vectors = iter(outputs.float().cpu())
        for at in range(len(_CONTRAST)):
            for vector_of, example in zip(found, examples, strict=True):
                for column in example.more["columns"][at : at + 1]:
                    vector_of[column] = next(vectors)
        return [
            {"vectors": vectors} if example.labels else _said(vectors)
            for vectors, example in zip(found, examples, strict=True)
        ]

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        if not predictions:
            return dict.fromkeys(self.goals, math.nan)
        first, second, third = (_vectors(predictions, examples, at) for at in range(3))
        if _are_scored(examples):
            scores = [example.labels[0] for example in examples]
            wanted, cosines = _scaled(scores, self.span or _span(scores)), _cosines(first, second)
            found = figures(Labels((), "regression"), wanted[:, None].tolist(), cosines[:, None].tolist())
            return {"loss": float(F.mse_loss(cosines.double(), wanted.double())), **found}
        known: dict[object, int] = {}
        said = [
            numbered((tuple(text.input_ids) for e in examples for text in _texts(e)[at : at + 1]), known)
            for at in range(3)
        ]
        found_by = ranking(first, torch.cat([second, third]), said[0], torch.cat(said[1:]))
        return {"loss": float(found_by.losses.double().mean()), **found_by.figures}

    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        return {}

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        pieces = [
            Piece(f"{column}: {processor.decode(text.input_ids, skip_special_tokens=True)}\n", column == "positive")
            for column, text in zip(example.more["columns"], _texts(example), strict=True)
        ]
        scored = example.labels and _are_scored([example])
        return [*pieces, *([Piece(f"score: {example.labels[0]:g}", trained=True)] if scored else [])]

    def _read(self, row: Row, *, labelled: bool) -> tuple[dict[str, str], list[float]]:
        """A row's texts by their columns, and what is to be told of them."""
        if not labelled:
            return _any_texts(row), []
        kind = _kind(row) if self.kind is None else self.kind
        if kind == "score":
            return {column: text_of(row, column) for column in _SCORE}, [number(row, "score")]
        optional = row.values.get("negative") is not None
        texts = {column: text_of(row, column) for column in _CONTRAST[: 2 + optional]}
        if texts.get("negative") == texts["positive"]:
            raise DataError(f"{row.origin} has the same text as positive and as negative.")
        return texts, [1.0]


def _kind(row: Row) -> Kind:
    if "anchor" in row.values or "positive" in row.values:
        return "contrast"
    if "text_pair" in row.values or "score" in row.values:
        return "score"
    raise DataError(
        f"{row.origin} has the columns {listed(map(str, row.values)) or 'none'}; expected anchor + positive (+ "
        "negative), or text + text_pair + score."
    )


def _any_texts(row: Row) -> dict[str, str]:
    """The texts of a row that is only to be predicted: its anchor or text, and what else is there."""
    columns = _CONTRAST if "anchor" in row.values else _SCORE
    more = [column for column in columns[1:] if row.values.get(column) is not None]
    return {column: text_of(row, column) for column in (columns[0], *more)}


def _span(scores: Sequence[float]) -> tuple[float, float]:
    """The scores that cosines of 0 and 1 stand for: as they are where all could be cosines, else the extremes."""
    low, high = min(scores), max(scores)
    return (0.0, 1.0) if low >= -1 and high <= 1 else (low, high if high > low else low + 1)


def _scaled(scores: Sequence[float], span: tuple[float, float]) -> Tensor:
    low, high = span
    return torch.tensor([(score - low) / (high - low) for score in scores], dtype=torch.float32)


def _joined(row: Row, columns: Sequence[str], labels: list[float], texts: Sequence[Encoded]) -> Encoded:
    """Texts one behind the other, so that an example's tokens are all that go through the model."""
    ids = [token for text in texts for token in text.input_ids]
    more: dict[str, Any] = {"columns": list(columns), "lengths": [len(text.input_ids) for text in texts]}
    if "token_type_ids" in texts[0].more:
        more["token_type_ids"] = [kind for text in texts for kind in text.more["token_type_ids"]]
    return Encoded(row.origin, ids, labels, more)


def _texts(example: Encoded) -> list[Encoded]:
    """The texts of an example, each by itself."""
    ends = [sum(example.more["lengths"][:at]) for at in range(len(example.more["lengths"]) + 1)]
    kinds = example.more.get("token_type_ids")
    return [
        Encoded(example.origin, example.input_ids[a:b], [], {"token_type_ids": kinds[a:b]} if kinds else {})
        for a, b in pairwise(ends)
    ]


def _cosines(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    return (first_BD * second_BD).sum(-1)


def _vectors(predictions: Sequence[Prediction], examples: Sequence[Encoded], at: int) -> Tensor:
    """The vectors of all first, second or third texts."""
    each = [p["vectors"][c] for p, e in zip(predictions, examples, strict=True) for c in e.more["columns"][at : at + 1]]
    return torch.stack(each) if each else torch.zeros(0, len(next(iter(predictions[0]["vectors"].values()))))


def _are_scored(examples: Sequence[Encoded]) -> bool:
    scored = [example.more["columns"][0] == _SCORE[0] for example in examples]
    if any(scored) and not all(scored):
        raise DataError(
            f"{examples[scored.index(not scored[0])].origin} is of another kind than {examples[0].origin}; expected "
            "rows with anchor + positive, or rows with text + text_pair + score, not both."
        )
    return scored[0]


def _said(vectors: Mapping[str, Tensor]) -> Prediction:
    """Vectors as they are written: that of the first text, those of the others by their columns, and how near."""
    (_, first), *others = vectors.items()
    found: Prediction = {"embedding": first.tolist()}
    if others:
        found["others"] = {column: vector.tolist() for column, vector in others}
        found["cosines"] = {column: float(first @ vector) for column, vector in others}
    return found
