"""``veneer predict``: what a model says of each row of a file, as JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.output import console
from veneer.cli.run_fields import run_options
from veneer.core.config import field_docs
from veneer.core.errors import UsageError
from veneer.tasks.sampling import Sampling
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from veneer.data.rows import Row
    from veneer.evaluate.subject import Subject
    from veneer.tasks.task import Prediction

_DEFAULT, _HELP = Sampling(), field_docs(Sampling)


@run_options("task", "code", "max_length", "columns", "batch_size", "quantize", "matmul")
def predict(
    data: Annotated[list[str], typer.Option(metavar="FILE", help="A data file or a folder of them; may be repeated.")],
    model: Annotated[
        str | None, typer.Option(help="A model folder or hub name; without it, the adapter's own base.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="RUN", help="A run or adapter folder.")] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="Where to write; without it, to the screen.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the saved one.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help=_HELP["max_new_tokens"])] = _DEFAULT.max_new_tokens,
    temperature: Annotated[float, typer.Option(help=_HELP["temperature"])] = _DEFAULT.temperature,
    top_p: Annotated[float, typer.Option(help=_HELP["top_p"])] = _DEFAULT.top_p,
    seed: Annotated[int, typer.Option(help=_HELP["seed"])] = _DEFAULT.seed,
    *,
    run_values: dict[str, Any],
) -> dict[str, Any]:
    """Predict the rows of a file, which need no labels.

    The task is the one that the adapter was trained for. Each line has the row's place in its file under origin, and
    what the task predicts: a label with scores, a number, tags, a text. How tokens are chosen matters to texts alone.

    Example: veneer predict --adapter ./run --data new.jsonl --output predicted.jsonl
    """
    from veneer.core.disk import write_text
    from veneer.data.sources import read_rows
    from veneer.engine.matmul import multiplying, settled
    from veneer.evaluate.subject import Subject

    settings = RunConfig(**run_values, output="-")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if output is not None and output.exists() and not force:
        raise UsageError(f"The output {str(output)!r} exists; name another, or replace it with --force.")
    read = read_rows(data)
    subject = Subject.load(
        model, adapter, task=run_values.get("task"), dtype=dtype, quantize=settings.quantize, code=settings.code
    )
    rows = subject.rows(read, settings.columns)
    with multiplying(settled(settings.matmul, subject.model)):
        found = _predicted(subject, rows, settings, sampling)
    lines = [json.dumps(line, ensure_ascii=False) for line in found]
    if output is not None:
        write_text(output, "".join(f"{line}\n" for line in lines))
        console().print(f"{len(lines):,} predictions in {output}", markup=False)
    else:
        sys.stdout.writelines(f"{line}\n" for line in lines)
    about = {"model": subject.base, "adapter": adapter, "task": subject.task_name, "rows": len(rows)}
    return {**about, "output": output, "predictions": None if output is not None else found}


def _predicted(subject: Subject, rows: list[Row], settings: RunConfig, sampling: Sampling) -> list[Prediction]:
    from veneer.report.progress import shares
    from veneer.tasks.task import predict as ask
    from veneer.tasks.writing import AbstractWriter, write

    task, model, size = subject.task, subject.model, settings.batch_size
    processor, notes = task.prepare(rows, subject.processor)
    for note in notes:
        console(stderr=True).print(f"note: {note}", style="yellow", markup=False)
    for row in rows:
        task.check(row, labelled=False)
    most = subject.most(settings.max_length)
    with shares(console(stderr=True), "predicting") as on_share:
        if isinstance(task, AbstractWriter):
            examples = task.ask(rows, processor, max_length=most)
            written = write(task, model, examples, processor, sampling, batch_size=size, on_share=on_share)
            return [
                {"origin": example.origin, "text": one.text, "tokens": one.tokens, "stopped": one.stopped}
                for example, one in zip(examples, written, strict=True)
            ]
        how = {"max_length": most, "train_on": settings.train_on, "labelled": False}
        examples = list(task.encode(rows, processor, **how).examples)
        device = next(model.parameters()).device
        return ask(task, model, examples, processor, batch_size=size, device=device, on_share=on_share)
