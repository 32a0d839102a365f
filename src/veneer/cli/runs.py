"""``veneer runs``: what the run folders below a folder hold, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.output import console
from veneer.core.errors import UsageError


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Run folders, or folders with runs below them.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the config fields that differ, a column for each run.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the loss curves into one PNG file.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a picture that is there.")] = False,
) -> dict[str, Any]:
    """List and compare runs.

    Everything is read from the run folders, of runs that are still going too. Without a folder, the current one is
    searched.

    Example: veneer runs runs/a runs/b --compare --plot curves.png
    """
    from veneer.report.overlay import overlay
    from veneer.report.runs import compare_table, differing, find_runs, runs_table

    if plot is not None and plot.exists() and not force:
        raise UsageError(f"{str(plot)!r} exists; name another file, or use --force.")
    found = find_runs(folders or [Path()])
    if compare and len(found) < 2:
        raise UsageError(f"There is only one run, {found[0].folder!r}; name another to compare it with.")
    screen = console()
    screen.print(compare_table(found) if compare else runs_table(found))
    if plot is not None:
        overlay(found, plot)
        screen.print(f"curves: {plot}", markup=False)
    return {"runs": found, "differing": differing(found), "plot": plot}
