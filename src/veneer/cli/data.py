"""``veneer data``: what a data file is as training sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.output import console
from veneer.cli.run_fields import run_options
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from veneer.data.encode import EncodedSet

SHARES = (0, 10, 50, 90, 99, 100)
"""The percentiles of the lengths that are shown."""


@run_options("task", "max_length", "truncate", "train_on", "columns", "batch_size")
def data(
    paths: Annotated[list[str], typer.Argument(metavar="FILE...", help="Data files, or folders of them.")],
    model: Annotated[str, typer.Option(help="The model whose tokenizer is used: a folder, or a name on the hub.")],
    preview: Annotated[int, typer.Option(min=0, help="How many examples to show.")] = 1,
    *,
    run_values: dict[str, Any],
) -> dict[str, Any]:
    """Show what would be trained on: examples with their trained parts, counts, lengths, padding, bad rows.

    Rows that cannot be used are named with their line and reason, and counted.

    Example: veneer data train.jsonl --model ./model
    """
    from veneer.data.batching import padding
    from veneer.data.sources import read_rows
    from veneer.report.preview import preview as drawn
    from veneer.tasks import task as tasks
    from veneer.tasks.loading import load_tokenizer
    from veneer.train.sets import checked

    settings = RunConfig(**run_values, output="-")
    task, bad = tasks.get(settings.task), list[str]()
    rows = checked(read_rows(paths, bad=bad), settings.columns, bad)
    tokenizer, notes = task.prepare(rows, load_tokenizer(model))
    how: dict[str, Any] = {name: getattr(settings, name) for name in ("max_length", "train_on", "truncate")}
    found = task.encode(rows, tokenizer, **how)
    screen = console()
    for example in found.examples[:preview]:
        screen.print(drawn(task.preview(example, tokenizer), origin=example.origin))
    lengths = sorted(found.lengths)
    percentiles = {share: lengths[min(len(lengths) - 1, len(lengths) * share // 100)] for share in SHARES}
    saved = padding(found.lengths, settings.batch_size)
    _show(found, percentiles, saved, bad, notes)
    return {
        **found.report.to_dict(),
        "bad_rows": bad,
        "length_percentiles": percentiles,
        "padding": saved,
        "fingerprint": found.fingerprint,
        "notes": notes,
    }


def _show(found: EncodedSet, percentiles: dict[int, int], saved: float, bad: list[str], notes: list[str]) -> None:
    from veneer.report.tables import facts

    report = found.report
    cut = f"{report.truncated:,} cut by {report.tokens_cut:,} tokens, {report.dropped:,} dropped"
    rows = {
        "rows": f"{report.rows + len(bad):,}, {len(bad):,} of them bad",
        "examples": f"{report.examples:,}, {report.left_out:,} left out for having no token to train",
        "tokens": f"{report.tokens:,}, {report.trained_tokens:,} of them trained",
        "too long": cut,
        "length": ", ".join(f"{share} %: {length:,}" for share, length in percentiles.items()),
        "padding": f"{saved:.0%} of padded batches; packed, there is none",
    }
    screen = console()
    screen.print(facts(rows))
    for reason in bad[:10]:
        screen.print(f"bad: {reason}", style="red", markup=False)
    if len(bad) > 10:
        screen.print(f"... and {len(bad) - 10:,} more bad rows", style="red")
    for note in notes:
        screen.print(f"note: {note}", style="yellow", markup=False)
