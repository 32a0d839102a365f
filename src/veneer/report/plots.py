"""The curves of a run folder: training loss, the same smoothed, and the held-out loss; below, how the run went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.core.disk import write_whole
from veneer.report.runs import read_events

PLOT_NAME = "loss.png"

_INK, _GRID, _TRAIN, _HELD_OUT = "#30353b", "#e4e6e9", "#3b6fb6", "#d1622b"

_UNITS = {
    **dict.fromkeys(("seq_cls", "multiple_choice", "question_answering", "image_classification"), "example"),
    "feature_extraction": "example",
    "other": "example",
    "token_cls": "word",
}
"""From tasks to what their loss is the mean over, where that is no token."""

_OTHERS = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
}


@dataclass(frozen=True)
class Curve:
    """What a run's log says about its loss."""

    title: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    """The training loss, in nats a trained token, logged at each of ``steps``."""
    held_out_steps: tuple[int, ...]
    held_out_losses: tuple[float, ...]
    unit: str = "trained token"
    """What a loss is the mean over."""
    others: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What else is logged at each of ``steps``: from its title to the values, nan where there is none."""


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
        unit=_UNITS.get(start.get("task", ""), "trained token"),
        others={
            title: tuple(math.nan if event.get(name) is None else event[name] for event in steps)
            for name, title in _OTHERS.items()
            if any(event.get(name) is not None for event in steps)
        },
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
    figure = Figure(figsize=(8, 6.2 if curve.others else 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if curve.others:
        above, below = figure.subfigures(2, 1, height_ratios=(2.6, 1))
        _draw(above.add_subplot(), curve)
        panels = below.subplots(1, len(curve.others), squeeze=False)[0]
        for axes, (title, values) in zip(panels, curve.others.items(), strict=True):
            _draw_other(axes, title, curve.steps, values)
    else:
        _draw(figure.add_subplot(), curve)
    path = Path(folder) / PLOT_NAME
    write_whole(path.parent, {path.name: lambda beside: figure.savefig(beside, format="png")})
    return path


def _draw_other(axes: Any, title: str, steps: Sequence[int], values: Sequence[float]) -> None:
    axes.plot(steps, values, color=_TRAIN, linewidth=1.2)
    axes.set_title(title, loc="left", color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, length=0, labelsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=4)
    axes.yaxis.get_major_locator().set_params(nbins=4)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set_size(7)
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


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
    axes.set_ylabel(f"loss (per {curve.unit})", color=_INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=_INK, length=0)
    axes.margins(x=0.02, y=0.12)
    _bare(axes)
    if curve.steps or curve.held_out_steps:
        axes.legend(frameon=False, labelcolor=_INK, loc="upper right")
