"""``veneer resize``: a LoRA at another rank, with what each layer keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.output import console
from veneer.cli.rank_choice import ENERGY_HELP, R_HELP, padding_note, rank_from
from veneer.core.errors import UsageError


def resize(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run or adapter folder.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the new adapter.", show_default=False)],
    r: Annotated[int | None, typer.Option("--r", help=R_HELP, show_default=False)] = None,
    energy: Annotated[float | None, typer.Option(help=ENERGY_HELP, show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that stands at the output.")] = False,
) -> dict[str, Any]:
    """Give a LoRA another rank.

    Each layer becomes the best approximation of its update at the new rank; the base model is not needed. A rank
    above a layer's own fills it up with zeros, so one rank for all layers is always possible.

    Example: veneer resize ./run --energy 0.95 --output ./smaller
    """
    from veneer.adapters import files
    from veneer.adapters.derived import check_output, write
    from veneer.adapters.resize import resize as resized
    from veneer.report.approximations import approximation_table, error_overall, kept_overall, percent, shown_ranks
    from veneer.report.tables import facts, megabytes
    from veneer.tasks.loading import adapter_folder

    rank = rank_from(r, energy)
    if rank is None:
        raise UsageError("Neither --r nor --energy is given; say which rank, or which share of the energy, to keep.")
    folder = adapter_folder(adapter)
    check_output(output, force=force)
    read = files.read(folder)
    new, layers = resized(read, rank)
    kept = kept_overall(layers)
    wanted = f"rank {r}" if energy is None else f"{percent(energy)} of each layer's energy"
    figures = {"made from": f"{folder}, resized to {wanted}", "energy kept": percent(kept)}
    size = write(output, new, figures=figures, beside=folder)
    before = sum(tensor.numel() * tensor.element_size() for tensor in read.tensors.values())
    shown = {
        "energy kept": percent(kept),
        "relative error": f"{error_overall(layers):.2g}",
        "ranks": shown_ranks(layers),
        "size": f"{megabytes(before)} before, {megabytes(size)} now",
        "written to": str(output),
    }
    console().print(approximation_table(layers), facts(shown), sep="\n")
    note = padding_note(layers)
    if note is not None:
        console(stderr=True).print(note, style="yellow", markup=False)
    return {
        "adapter": str(folder),
        "output": output,
        "kept": kept,
        "error": error_overall(layers),
        "bytes_before": before,
        "bytes": size,
        "layers": layers,
        "notes": [note] if note else [],
    }
