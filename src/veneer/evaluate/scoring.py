"""How well a model does on data: the loss and the metrics of its task, and how near its answers come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from veneer.core.errors import DataError, UsageError
from veneer.data.encode import Encoded, EncodedSet, EncodingReport, check_trained
from veneer.data.rows import Row
from veneer.evaluate.subject import Subject
from veneer.tasks.sampling import Sampling
from veneer.tasks.task import AbstractTask, Measured, measure
from veneer.tasks.writing import AbstractWriter, question, write
from veneer.train.config import RunConfig
from veneer.train.sets import Asked, Reader, bad_rows


@dataclass(frozen=True)
class Score:
    """The figures of a model on a data set."""

    metrics: dict[str, float]
    """By name; ``loss`` is the mean over supervised units, in nats."""
    details: dict[str, Any]
    """What is no single number, as a confusion matrix."""
    data: EncodingReport
    """What was measured on, and what was cut or left out."""
    notes: tuple[str, ...]
    """What was decided on the way, in sentences."""

    def to_dict(self) -> dict[str, Any]:
        """The metrics by name, the data's counts and the notes."""
        return {**self.metrics, **self.details, "data": asdict(self.data), "notes": list(self.notes)}


def score(subject: Subject, asked: Asked, settings: RunConfig) -> Score:
    """Encode data as training would, and measure a model on it, on the device that it is on.

    Args:
        subject: the model with its task.
        asked: the data.
        settings: how to read it: ``max_length``, ``train_on``, ``batch_size``, ``on_bad_row``, ``workers``, ``cache``.

    Raises:
        DataError: a row that is not of the task, or nothing to measure.
    """
    processor, notes = subject.task.prepare(asked, subject.processor)
    reader = Reader(settings, subject.task, asked.columns, processor, subject.config)
    read = [reader.read(part.sources) for part in asked.parts]
    encoded = read[0].store.set_of()
    check_trained(encoded.report, reader.max_length)
    found = score_encoded(subject.model, processor, encoded, subject.task, batch_size=settings.batch_size)
    said = (*notes, *bad_rows(read), *reader.notes(read))
    return Score(found.metrics, found.details, encoded.report, said)


def score_encoded(
    model: nn.Module, processor: Any, encoded: EncodedSet, task: AbstractTask, *, batch_size: int
) -> Measured:
    """A model's figures on examples. Without gradients or dropout; the model's mode is put back."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return measure(task, model, encoded.examples, processor, batch_size=batch_size, device=device)


def answering(subject: Subject, database: str | None) -> Subject:
    """A subject whose answers can be judged: on this database, else on the one that it was trained with.

    Raises:
        UsageError: its task writes no answers, or the database is not there.
        ConfigError: a database, and nothing that judges by it.
    """
    task = subject.task
    if not isinstance(task, AbstractWriter):
        raise UsageError("Answers are asked for, and models of this task write none; leave --answers out.")
    judges = task.judges.on(database) if database is not None else task.judges
    judges.ready()
    return replace(subject, task=task.judged_by(judges))


def score_answers(
    subject: Subject, rows: Iterable[Row], most: int, sampling: Sampling, settings: RunConfig
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of answers that are written token by token, and the answers beside those that are right.

    Rows that ask the same thing are one question, whose every answer is right.

    Args:
        subject: as ``answering`` gave it.
        rows: the questions with what is right.
        most: how many questions are asked, the first ones.
        sampling: how tokens are chosen.
        settings: ``max_length`` and ``batch_size``.

    Raises:
        DataError: a row of these questions that is not of the task, or that has no answer to compare with.
    """
    task = subject.task
    assert isinstance(task, AbstractWriter)
    known = list(rows)
    processor, _ = task.prepare(known, subject.processor)
    asked = _questions(task, known, processor, most, subject.most(settings.max_length))
    examples, references = [example for example, _ in asked], [right for _, right in asked]
    written = write(task, subject.model, examples, processor, sampling, batch_size=settings.batch_size)
    texts = [one.text for one in written]
    said = [
        {"origin": example.origin, "text": text, "expected": right}
        for example, text, right in zip(examples, texts, references, strict=True)
    ]
    return task.judge(texts, references), said


def _questions(
    task: AbstractWriter, rows: Iterable[Row], processor: Any, most: int, max_length: int
) -> list[tuple[Encoded, list[str]]]:
    """The first questions, each with what all rows say is right."""
    found: dict[str, tuple[Encoded, list[str]]] = {}
    for row in rows:
        try:
            (example,) = task.ask([row], processor, max_length=max_length)
            reference = example.more["reference"]
            if reference is None:
                raise DataError(f"{example.origin} has no answer to compare with.")
        except DataError:
            if len(found) < most:
                raise
            # Behind the last question only more answers to known ones are looked for.
            continue
        key = question(example)
        if key in found:
            found[key][1].append(reference)
        elif len(found) < most:
            found[key] = (example, [reference])
    return list(found.values())
