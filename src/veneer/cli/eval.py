"""``veneer eval``: the loss and the metrics of a task on a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.output import console
from veneer.cli.run_fields import run_options
from veneer.core.config import field_docs
from veneer.core.errors import UsageError, listed
from veneer.tasks.sampling import Sampling
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from veneer.data.sources import Source
    from veneer.evaluate.scoring import Score

_DEFAULT, _HELP = Sampling(), field_docs(Sampling)


@run_options(
    *(
        "task",
        "code",
        "max_length",
        "train_on",
        "columns",
        "on_bad_row",
        "workers",
        "cache",
        "batch_size",
        "quantize",
        "database",
        "matmul",
    ),
)
def evaluate(
    data: Annotated[list[str], typer.Option(metavar="FILE", help="A data file or a folder of them; may be repeated.")],
    model: Annotated[
        str | None, typer.Option(help="A model folder or hub name; without it, the adapter's own base.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="RUN", help="A run or adapter folder.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the saved one.")] = "float32",
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where to draw which label was taken for which.")
    ] = None,
    answers: Annotated[
        int,
        typer.Option(min=0, help="Questions, the first ones, to answer token by token and compare with what is right."),
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help=_HELP["max_new_tokens"])] = _DEFAULT.max_new_tokens,
    *,
    run_values: dict[str, Any],
) -> dict[str, Any]:
    """Measure a model, with an adapter or without, on JSONL, CSV or Parquet.

    The task is the one that the adapter was trained for. Of a folder, the files called test are read, else those
    called valid, else all. Of a language model only answers count, as in training; --train-on all counts every token.

    Example: veneer eval --model ./model --adapter ./run --data test.jsonl
    """
    from veneer.engine.matmul import multiplying, settled
    from veneer.evaluate.scoring import answering, score, score_answers
    from veneer.evaluate.subject import Subject
    from veneer.tasks.writing import AbstractWriter

    # Every field has RunConfig's default and check; an output is the one that evaluation does not need.
    settings = RunConfig(**run_values, output="-")
    if settings.database is not None and not answers:
        raise UsageError("--database is what answers are executed on; say with --answers how many there are to be.")
    files, note = _files(data)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    subject = Subject.load(
        model, adapter, task=run_values.get("task"), dtype=dtype, quantize=settings.quantize, code=settings.code
    )
    if answers:
        subject = answering(subject, settings.database)
    asked = subject.asked(files, settings.columns)
    with multiplying(settled(settings.matmul, subject.model)):
        found = score(subject, asked, settings)
        if answers:
            judged, said = score_answers(subject, asked, answers, sampling, settings)
            found = replace(found, metrics={**found.metrics, **judged}, details={**found.details, "answers": said})
    notes = [*([note] if note else []), *found.notes]
    _show(found, notes, writes=isinstance(subject.task, AbstractWriter))
    if plot is not None:
        _draw(plot, found)
    about = {
        "model": subject.base,
        "adapter": adapter,
        "task": subject.task_name,
        "files": [file.place for file in files],
    }
    return {**about, **found.to_dict(), "notes": notes}


def _files(data: list[str]) -> tuple[list[Source], str | None]:
    """The files to measure on, and a sentence when that is not all there are."""
    from veneer.data.sources import HELD_OUT_NAMES, TEST_NAMES, chosen, sources

    found = [sources(name) for name in data]
    taken = [chosen(files, TEST_NAMES) or chosen(files, HELD_OUT_NAMES) or files for files in found]
    files = sources([file for some in taken for file in some])
    fewer = sum(map(len, taken)) < sum(map(len, found))
    note = f"Of {listed(data)}, {listed(file.name for file in files)} is measured on." if fewer else None
    return files, note


def _show(score: Score, notes: list[str], *, writes: bool) -> None:
    from veneer.report.tables import facts, per_label_table

    data = score.data
    rows = {name.replace("_", " "): f"{value:.4f}" for name, value in score.metrics.items()}
    of = f" of {data.tokens:,}" if data.tokens else ""
    answers = f", {data.trained_tokens:,}{of} tokens" if writes else ""
    rows["measured on"] = f"{data.examples:,} examples{answers}"
    if data.truncated or data.left_out:
        rows["not measured"] = (
            f"{data.tokens_cut:,} tokens of {data.truncated:,} truncated examples, {data.left_out:,} examples left out"
        )
    screen = console()
    screen.print(facts(rows))
    if score.details.get("per_label"):
        screen.print(per_label_table(score.details["per_label"]))
    for note in notes:
        screen.print(f"note: {note}", style="yellow", markup=False)


def _draw(path: Path, score: Score) -> None:
    from veneer.report.confusion import confusion_plot

    if "confusion" not in score.details:
        raise UsageError("--plot draws which label was taken for which, and this task has no single label an example.")
    confusion_plot(score.details["confusion"], path)
