"""Token classification: a tag for each word, as in named entity recognition."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.core.errors import ConfigError, DataError, listed
from veneer.core.task_type import TaskType
from veneer.data.encode import IGNORED, Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.data.texts import encode_texts, pad, text_of
from veneer.tasks.figures import check_installed
from veneer.tasks.labels import UNKNOWN, Labels
from veneer.tasks.options import TaskOptions
from veneer.tasks.task import AbstractTask, BatchLoss, Goals, Piece, Prediction, Tally

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WORDS, _TAGS = "tokens", "tags"


@final
@dataclass(frozen=True)
class Task(AbstractTask):
    """The first token of each word is given the word's tag; a unit is a word."""

    labels: Labels = UNKNOWN

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    task_type: ClassVar[TaskType] = TaskType.TOKEN_CLS
    packs: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = (_WORDS, _TAGS)

    @property
    def goals(self) -> Goals:
        found: Goals = {"loss": "min", "token_accuracy": "max"}
        return {**found, "precision": "max", "recall": "max", "f1": "max"} if _has_spans(self.labels.names) else found

    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> Task:
        options.refuse("token_cls", "labels", "class_weights")
        check_installed("seqeval")
        one_a_word = (Row(row.origin, {_TAGS: tag}) for row in rows for tag in _tags(row))
        return Task(Labels.of(one_a_word, options, _TAGS))

    def to_dict(self) -> dict[str, Any]:
        return self.labels.to_dict()

    def restored(self, values: Mapping[str, Any]) -> Task:
        return Task(Labels.restored(values))

    def described(self, config: PretrainedConfig) -> Task:
        return Task(Labels.described(config))

    def model_options(self) -> dict[str, Any]:
        options = self.labels.model_options()
        # transformers knows problem types for whole sequences only.
        return {name: value for name, value in options.items() if name != "problem_type"}

    def check(self, row: Row, *, labelled: bool = True) -> None:
        words, tags = _words(row), _tags(row) if labelled else None
        if tags is not None and len(words) != len(tags):
            raise DataError(f"{row.origin} has {len(words)} {_WORDS} and {len(tags)} {_TAGS}; expected a tag a word.")

    def prepare(self, rows: Iterable[Row], processor: Any) -> tuple[Any, list[str]]:
        if not processor.is_fast:
            raise ConfigError(
                f"{type(processor).__name__} does not say which word a token is of; expected a fast tokenizer."
            )
        if getattr(processor, "add_prefix_space", True) is False:
            from transformers import AutoTokenizer

            # Otherwise words that stand alone would be tokens that never begin a word in a text.
            source = processor.name_or_path
            return AutoTokenizer.from_pretrained(source, add_prefix_space=True, trust_remote_code=False), []
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
        for row in rows:
            self.check(row, labelled=labelled)
        words = [_words(row) for row in rows]
        places = [
            [self.labels.place(_tag(tag), row.origin, _TAGS) for tag in _tags(row)] if labelled else [] for row in rows
        ]

        def told(number: int, tokens: Any) -> tuple[list[int], dict[str, Any]]:
            of = tokens.word_ids()
            first = [at for at, word in enumerate(of) if word is not None and (at == 0 or word != of[at - 1])]
            seen = [of[at] for at in first]
            labels = [IGNORED] * len(of) if labelled else []
            for at, word in zip(first, seen, strict=True) if labelled else ():
                labels[at] = places[number][word]
            return labels, {"words": words[number], "first": first, "seen": seen}

        return encode_texts(
            rows,
            [(each, None) for each in words],
            processor,
            told,
            max_length=max_length,
            truncate=truncate,
            is_split_into_words=True,
        )

    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        batch = pad(examples, processor)
        if not examples[0].labels:
            return batch
        longest = batch["input_ids"].shape[1]
        labels = [[*example.labels, *[IGNORED] * (longest - len(example.labels))] for example in examples]
        return {**batch, "labels": torch.tensor(labels)}

    def units(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        truth = batch.get("labels")
        if truth is None:
            return BatchLoss(logits.new_zeros(()), Tally(), logits.detach())
        weight = self.labels.weight(logits.device)
        total = F.cross_entropy(logits.flatten(0, 1), truth.flatten(), weight=weight, reduction="sum")
        right = ((logits.argmax(-1) == truth) & (truth != IGNORED)).sum()
        return BatchLoss(total, Tally(float(total.detach()), self.units(batch), int(right)), logits.detach())

    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        scores, places = outputs.softmax(-1).max(-1)
        found: list[Prediction] = []
        for example, score, place in zip(examples, scores.tolist(), places.tolist(), strict=True):
            # A word that was cut off has no token, and counts as outside of everything.
            tags: list[str | None] = [None] * len(example.more["words"])
            sure: list[float | None] = [None] * len(tags)
            for at, word in zip(example.more["first"], example.more["seen"], strict=True):
                tags[word], sure[word] = self.labels.names[place[at]], score[at]
            found.append({"tokens": example.more["words"], "tags": tags, "scores": sure})
        return found

    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        found = {
            "loss": tally.loss / tally.units if tally.units else math.nan,
            "token_accuracy": tally.correct / tally.units if tally.units else math.nan,
        }
        if _has_spans(self.labels.names):
            from seqeval import metrics

            truths, guesses = self._sequences(predictions, examples)
            for name in ("precision", "recall", "f1"):
                found[name] = float(getattr(metrics, f"{name}_score")(truths, guesses, zero_division=0))
        return found

    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        if not predictions or not _has_spans(self.labels.names):
            return {}
        from seqeval import metrics

        truths, guesses = self._sequences(predictions, examples)
        table = metrics.classification_report(truths, guesses, output_dict=True, zero_division=0)
        per_label = {
            kind: {
                "precision": float(row["precision"]),
                "recall": float(row["recall"]),
                "f1": float(row["f1-score"]),
                "examples": int(row["support"]),
            }
            for kind, row in table.items()
            if not kind.endswith(" avg")
        }
        return {"per_label": per_label}

    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        tags = {word: example.labels[at] for word, at in zip(example.more["seen"], example.more["first"], strict=True)}
        pieces = []
        for word, text in enumerate(example.more["words"]):
            pieces.append(Piece(f"{text} ", trained=False))
            if word in tags and self.labels.names[tags[word]] != "O":
                pieces.append(Piece(f"{self.labels.names[tags[word]]} ", trained=True))
        grouped = groupby(pieces, key=lambda piece: piece.trained)
        return [Piece("".join(piece.text for piece in group), trained) for trained, group in grouped]

    def _sequences(
        self, predictions: Sequence[Prediction], examples: Sequence[Encoded]
    ) -> tuple[list[list[str]], list[list[str]]]:
        """The tags of the words that the model saw: those that are right, and the model's."""
        names = self.labels.names
        truths = [[names[example.labels[at]] for at in example.more["first"]] for example in examples]
        guesses = [
            [prediction["tags"][word] for word in example.more["seen"]]
            for prediction, example in zip(predictions, examples, strict=True)
        ]
        return truths, guesses


def _has_spans(names: Sequence[str]) -> bool:
    """Whether tags say where entities begin and go on: B-PER, I-PER, O."""
    return "O" in names and all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for name in names)


def _words(row: Row) -> list[str]:
    words = _list(row, _WORDS)
    for word in words:
        text_of(Row(row.origin, {_WORDS: word}), _WORDS)
    return words


def _tags(row: Row) -> list[Any]:
    return _list(row, _TAGS)


def _tag(value: Any) -> str:
    return str(value) if isinstance(value, int | str) else ""


def _list(row: Row, column: str) -> list[Any]:
    value = row.values.get(column)
    if isinstance(value, str):
        # A CSV cell can hold a list only as JSON.
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, list) or not value:
        have = listed(map(str, row.values))
        raise DataError(f"{row.origin} has no list of {column}; its columns are {have or 'none'}.")
    return value
