"""The loss curve of a run folder: training loss, the same smoothed, and the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.core.disk import write_whole
from veneer.report.runs import read_events

PLOT_NAME = "loss.png"

_INK, _GRID, _TRAIN, _HELD_OUT = "#30353b", "#e4e6e9", "#3b6fb6", "#d1622b"


@dataclass(frozen=True)
class Curve:
    """What a run's log says about its loss."""

    title: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    """The training loss, in nats a trained token, logged at each of ``steps``."""
    held_out_steps: tuple[int, ...]
    held_out_losses: tuple[float, ...]


def read_curve(folder: str | Path) -> Curve:
    """The curve in a run folder's ``log.jsonl``.

    Raises:
        UsageError: there is no log, or a line of it that cannot be read.
    """
    events = read_events(Path(folder))
    start = next((event for event in events if event["event"] == "start"), {})
    steps = [event for event in events if event["event"] == "step" and event["loss"] is not None]
    held_out = [event for event in events if event["event"] == "eval" and event["loss"] is not None]
    name = Path(str(start.get("model") or "model")).name
    return Curve(
        title=f"{name}, {start.get('method', 'training')}",
        steps=tuple(event["step"] for event in steps),
        losses=tuple(event["loss"] for event in steps),
        held_out_steps=tuple(event["step"] for event in held_out),
        held_out_losses=tuple(event["loss"] for event in held_out),
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean that forgets: its memory is a twentieth of the series, at least three values.

    Early values are weighted as if nothing had come before, so the curve starts at the first value.
    """
    keep = 1 - 1 / max(3.0, len(values) / 20)
    total = weight = 0.0
    means = []
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1
        means.append(total / weight)
    return means


def loss_plot(folder: str | Path) -> Path:
    """Draw ``loss.png`` into a run folder from its log.

    Returns:
        The picture's path.

    Raises:
        UsageError: see ``read_curve``.
        DiskError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = read_curve(folder)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, curve)
    path = Path(folder) / PLOT_NAME
    write_whole(path.parent, {path.name: lambda beside: figure.savefig(beside, format="png")})
    return path


def _draw(axes: Any, curve: Curve) -> None:
    if curve.steps:
        axes.plot(curve.steps, curve.losses, color=_TRAIN, alpha=0.25, linewidth=1, label="training, each step")
        axes.plot(curve.steps, smoothed(curve.losses), color=_TRAIN, linewidth=2, label="training, smoothed")
    if curve.held_out_steps:
        axes.plot(
            curve.held_out_steps,
            curve.held_out_losses,
            color=_HELD_OUT,
            linewidth=1.5,
            marker="o",
            markersize=5,
            label="held out",
        )
        for at in sorted({0, len(curve.held_out_steps) - 1}):
            axes.annotate(
                f"{curve.held_out_losses[at]:.3g}",
                (curve.held_out_steps[at], curve.held_out_losses[at]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="left" if at == 0 else "right",
                color=_HELD_OUT,
                fontweight="bold",
            )
    axes.set_title(curve.title, loc="left", color=_INK, fontsize=12, fontweight="bold")
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss (nats per trained token)", color=_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.12)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    if curve.steps or curve.held_out_steps:
        axes.legend(frameon=False, labelcolor=_INK, loc="upper right")
