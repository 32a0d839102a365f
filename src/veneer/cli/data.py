"""``veneer data``: what a data file is as training sees it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.output import console
from veneer.cli.run_fields import run_options
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from veneer.data.cache import Prepared
    from veneer.data.encode import EncodedSet

SHARES = (0, 10, 50, 90, 99, 100)
"""The percentiles of the lengths that are shown."""


@run_options(
    *("task", "labels", "problem", "prefix", "languages", "stride", "code", "max_length", "truncate"),
    *("train_on", "columns", "batch_size", "workers", "cache"),
)
def data(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Data files, or folders of them, also with weights: a.jsonl=3."),
    ],
    model: Annotated[str, typer.Option(help="The model whose tokenizer is used: a folder, or a name on the hub.")],
    preview: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 1,
    *,
    run_values: dict[str, Any],
) -> dict[str, Any]:
    """Show what would be trained on: examples with their trained parts, counts, lengths, padding, bad rows.

    Rows that cannot be used are named with their line and reason, and counted. What is encoded is kept for training.

    Example: veneer data train.jsonl --model ./model
    """
    from veneer.data.encode import joined
    from veneer.report.preview import preview as drawn
    from veneer.tasks import task as tasks
    from veneer.train.prepare import fitted
    from veneer.train.sets import Reader, asked_for, mix

    settings = RunConfig(**run_values, data=paths, eval_fraction=0, on_bad_row="skip", output="-")
    task = tasks.get(settings.task)
    asked = asked_for(settings, task, None, None)
    config, said = _config(model) if task.pretrained else (None, [])
    task = fitted(task, asked, settings, config)
    tokenizer, notes = task.prepare(asked, task.processor(model))
    notes = [*said, *notes]
    reader = Reader(settings, task, asked.columns, tokenizer, config, console(stderr=True))
    read = [reader.read(part.sources) for part in asked.parts]
    sets = [one.store.set_of() for one in read]
    found, (_, parts, mixed) = joined(sets), mix(asked.parts, sets)
    screen = console()
    for example in found.examples[:preview]:
        screen.print(drawn(task.preview(example, tokenizer), origin=example.origin))
    notes = [*asked.notes, *notes, *reader.notes(read), *mixed]
    figures = _figures(found, settings.batch_size)
    _show(found, read, figures, notes)
    return {
        **found.report.to_dict(),
        "bad": sum(one.store.bad for one in read),
        "bad_rows": [reason for one in read for reason in one.store.reasons],
        **figures,
        "fingerprint": found.fingerprint,
        "parts": parts,
        "cache": [str(one.kept) if one.kept else None for one in read],
        "from_cache": [one.reused for one in read],
        "notes": notes,
    }


def _config(model: str) -> tuple[PretrainedConfig | None, list[str]]:
    """The model's config, and what it means that there is none; a folder may have a tokenizer alone."""
    from veneer.tasks.loading import load_config

    if Path(model).expanduser().is_dir() and not (Path(model).expanduser() / "config.json").is_file():
        return None, [f"{model} has no config.json, so the model's longest input and vocabulary are not checked."]
    return load_config(model), []


def _figures(found: EncodedSet, batch_size: int) -> dict[str, Any]:
    from veneer.data.batching import padding

    lengths = sorted(found.lengths)
    percentiles = {share: lengths[min(len(lengths) - 1, len(lengths) * share // 100)] for share in SHARES if lengths}
    return {"length_percentiles": percentiles, "padding": padding(found.lengths, batch_size)}


def _show(found: EncodedSet, read: Sequence[Prepared], figures: dict[str, Any], notes: list[str]) -> None:
    from veneer.report.tables import facts

    report = found.report
    cut = f"{report.truncated:,} cut by {report.tokens_cut:,} tokens, {report.dropped:,} dropped"
    bad = sum(one.store.bad for one in read)
    reasons = [reason for one in read for reason in one.store.reasons]
    kept = [f"{'taken from' if one.reused else 'now kept in'} {one.kept}" for one in read if one.kept]
    rows = {
        "rows": f"{report.rows + bad:,}, {bad:,} of them bad",
        "examples": f"{report.examples:,}, {report.left_out:,} left out for having no token to train",
        "tokens": f"{report.tokens:,}, {report.trained_tokens:,} of them trained",
        "too long": cut,
        "length": ", ".join(f"{share} %: {length:,}" for share, length in figures["length_percentiles"].items()),
        "padding": f"{figures['padding']:.0%} of padded batches; packed, there is none",
        "encoded data": "; ".join(kept) or "not kept",
    }
    screen = console()
    screen.print(facts(rows))
    for reason in reasons[:10]:
        screen.print(f"bad: {reason}", style="red", markup=False)
    if bad > 10:
        screen.print(f"... and {bad - 10:,} more bad rows", style="red")
    for note in notes:
        screen.print(f"note: {note}", style="yellow", markup=False)
