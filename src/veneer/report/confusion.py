"""A picture of which label was taken for which."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.core.disk import write_whole
from veneer.report.heatmap import check_name

CONFUSION_NAME = "confusion.png"

_INK, _COLOURS = "#30353b", ("#f6f8fb", "#9dbce2", "#3b6fb6", "#173a6b")
_WRITTEN = 20
"""The most labels whose cells have room for a number."""


def confusion_plot(confusion: Mapping[str, Any], path: Path) -> Path:
    """Draw a confusion matrix: a row for each label that is right, a column for each that was said.

    The colour is the share of a row, so that rare labels are seen too; the numbers are counts.

    Args:
        confusion: ``labels``, and ``counts`` by row.
        path: a file name that ends in .png.

    Returns:
        The picture's path.

    Raises:
        UsageError: a file name of another kind.
        DiskError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    check_name(path)
    labels, counts = list(confusion["labels"]), confusion["counts"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    side = min(12.0, 2.2 + 0.5 * len(labels))
    figure = Figure(figsize=(side, side), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap=LinearSegmentedColormap.from_list("", _COLOURS), vmin=0, vmax=1)
    for at, row in enumerate(counts if len(labels) <= _WRITTEN else ()):
        for to, count in enumerate(row):
            colour = "white" if shares[at][to] > 0.5 else _INK
            axes.text(to, at, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    size = 10 if len(labels) <= _WRITTEN else 6
    axes.set_xticks(
        range(len(labels)), labels, rotation=45 if max(map(len, labels)) > 3 else 0, ha="right", fontsize=size
    )
    axes.set_yticks(range(len(labels)), labels, fontsize=size)
    axes.set_xlabel("predicted", color=_INK)
    axes.set_ylabel("true label", color=_INK)
    axes.tick_params(colors=_INK, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    write_whole(path.parent, {path.name: lambda beside: figure.savefig(beside, format="png")})
    return path
