"""``veneer eval``: loss, perplexity and token accuracy on a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.output import console
from veneer.cli.run_fields import run_options
from veneer.core.errors import UsageError, listed
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from veneer.data.sources import Source
    from veneer.evaluate.scoring import Score


@run_options(
    *("task", "max_length", "train_on", "columns", "on_bad_row", "workers", "cache", "batch_size", "quantize"),
)
def evaluate(
    data: Annotated[list[str], typer.Option(metavar="FILE", help="A data file or a folder of them; may be repeated.")],
    model: Annotated[
        str | None, typer.Option(help="A model folder or hub name; without it, the adapter's own base.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(metavar="RUN", help="A run or adapter folder.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the saved one.")] = "float32",
    *,
    run_values: dict[str, Any],
) -> dict[str, Any]:
    """Measure a model, with an adapter or without, on JSONL, CSV or Parquet.

    Of a folder, the files called test are read, else those called valid, else all. Only answers count, as in
    training; --train-on all counts every token.

    Example: veneer eval --model ./model --adapter ./run --data test.jsonl
    """
    if model is None and adapter is None:
        raise UsageError("Give --model, --adapter, or both.")
    # Every field has RunConfig's default and check; an output is the one that evaluation does not need.
    settings = RunConfig(**run_values, output="-")
    files, note = _files(data)
    score = _scored(model, adapter, files, settings, dtype)
    notes = [*([note] if note else []), *score.notes]
    _show(score, notes)
    places = [file.place for file in files]
    return {"model": model, "adapter": adapter, "files": places, **score.to_dict(), "notes": notes}


def _files(data: list[str]) -> tuple[list[Source], str | None]:
    """The files to measure on, and a sentence when that is not all there are."""
    from veneer.data.sources import HELD_OUT_NAMES, TEST_NAMES, chosen, sources

    found = [sources(name) for name in data]
    taken = [chosen(files, TEST_NAMES) or chosen(files, HELD_OUT_NAMES) or files for files in found]
    files = sources([file for some in taken for file in some])
    fewer = sum(map(len, taken)) < sum(map(len, found))
    note = f"Of {listed(data)}, {listed(file.name for file in files)} is measured on." if fewer else None
    return files, note


def _scored(model: str | None, adapter: str | None, files: list[Source], settings: RunConfig, dtype: str) -> Score:
    from veneer.adapters.model import PeftModel
    from veneer.core.config import PeftConfig
    from veneer.data.columns import parsed
    from veneer.data.encode import check_trained
    from veneer.evaluate.scoring import Score, score_encoded
    from veneer.tasks import task as tasks
    from veneer.tasks.loading import adapter_folder, load_config, load_model, tokenizer_for
    from veneer.train.sets import Asked, Part, Reader, bad_rows

    kind = tasks.get(settings.task)
    folder = adapter_folder(adapter) if adapter is not None else None
    if model is None:
        assert folder is not None
        model = PeftConfig.from_pretrained(folder).base_model_name_or_path
        if model is None:
            raise UsageError(f"The adapter {str(folder)!r} does not say what its base is; give it as --model.")
    columns = parsed(settings.columns) if settings.columns is not None else {}
    tokenizer = tokenizer_for(model, [folder] if folder is not None else [])
    tokenizer, notes = kind.prepare(Asked([Part("", None, files)], [], [], columns), tokenizer)
    reader = Reader(settings, kind, columns, tokenizer, load_config(model))
    read = reader.read(files)
    encoded = read.store.set_of()
    check_trained(encoded.report, reader.max_length)
    loaded: Any = load_model(model, auto_class=kind.auto_class, dtype=dtype, quantize=settings.quantize)
    if folder is not None:
        loaded = PeftModel.from_pretrained(loaded, folder)
    figures = score_encoded(loaded, tokenizer, encoded, kind, batch_size=settings.batch_size)
    return Score(figures, encoded.report, (*notes, *bad_rows([read]), *reader.notes([read])))


def _show(score: Score, notes: list[str]) -> None:
    from veneer.report.tables import facts

    data = score.data
    rows = {name.replace("_", " "): f"{value:.4f}" for name, value in score.metrics.items()}
    rows["measured on"] = f"{data.examples:,} examples, {data.trained_tokens:,} of {data.tokens:,} tokens"
    if data.truncated or data.left_out:
        rows["not measured"] = (
            f"{data.tokens_cut:,} tokens of {data.truncated:,} truncated examples, {data.left_out:,} examples left out"
        )
    screen = console()
    screen.print(facts(rows))
    for note in notes:
        screen.print(f"note: {note}", style="yellow", markup=False)
