"""The loss curves of several runs in one picture: over the steps, and over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.core.disk import write_whole
from veneer.core.errors import UsageError
from veneer.report.heatmap import check_name
from veneer.report.plots import smoothed
from veneer.report.runs import Run, duration, read_events

_INK, _FAINT, _GRID = "#30353b", "#8a9099", "#e4e6e9"
_COLOURS = ("#3b6fb6", "#d1622b", "#2e8b6f", "#8e5ea8", "#b8922c", "#c2497d", "#4c9fb8", "#6b7280")
MOST = len(_COLOURS)
"""More curves than this cannot be told apart in one picture."""


def overlay(runs: Sequence[Run], path: Path) -> None:
    """Draw the curves: training smoothed as a line, held out as dots on a thin one, in one colour for each run.

    Args:
        runs: at most ``MOST``.
        path: a file name that ends in .png.

    Raises:
        UsageError: nothing to draw, too many runs, or the name ends otherwise.
        DiskError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_name(path)
    if len(runs) > MOST:
        raise UsageError(f"{len(runs)} curves in one picture cannot be told apart; name at most {MOST} run folders.")
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    drawn = [_draw(by_step, by_time, run, colour) for run, colour in zip(runs, _COLOURS, strict=False)]
    if not any(drawn):
        raise UsageError("There is nothing to draw: none of these runs has taken a step.")
    longest = max(run.seconds for run in runs)
    _dress(by_step, "over the steps", "step")
    _dress(by_time, "over time", "minutes" if longest >= 120 else "seconds")
    by_step.set_ylabel("loss (nats per trained token)", color=_INK)
    handles, labels = by_step.get_legend_handles_labels()
    rows = -(-len(labels) // 2)
    figure.legend(
        handles, labels, loc="outside lower left", ncols=-(-len(labels) // rows), frameon=False, labelcolor=_INK
    )
    figure.suptitle("Loss: training smoothed, held out dotted", x=0.01, ha="left", color=_INK, fontweight="bold")
    write_whole(path.parent, {path.name: lambda beside: figure.savefig(beside, format="png")})


def _draw(by_step: Any, by_time: Any, run: Run, colour: str) -> bool:
    events = [e for e in read_events(Path(run.folder)) if e["event"] in ("step", "eval") and e.get("loss") is not None]
    training = [event for event in events if event["event"] == "step"]
    held_out = [event for event in events if event["event"] == "eval"]
    label = f"{run.name}: {run.method}, {duration(run.seconds)}"
    if run.best_loss is not None:
        label += f", best {run.best_loss:.3f}"
    for axes, field in ((by_step, "step"), (by_time, "seconds")):
        losses = smoothed([event["loss"] for event in training])
        axes.plot([event[field] for event in training], losses, color=colour, linewidth=2, label=label)
        axes.plot(
            [event[field] for event in held_out],
            [event["loss"] for event in held_out],
            color=colour,
            linewidth=1,
            linestyle=":",
            marker="o",
            markersize=5,
            markeredgecolor="white",
        )
    return bool(events)


def _dress(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", color=_FAINT, fontsize=10)
    axes.set_xlabel(unit, color=_INK)
    if unit == "minutes":
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 60:g}")
        from matplotlib.ticker import MultipleLocator

        span = axes.get_xlim()[1] / 60
        axes.xaxis.set_major_locator(MultipleLocator(60 * max(1, round(span / 6))))
    elif unit == "step":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
