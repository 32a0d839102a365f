"""A heat map of numbers by layer: columns are the layers of a model, rows the kinds of module in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.core.disk import write_whole
from veneer.core.errors import UsageError
from veneer.core.records import AdapterOverlap, AdapterSpectrum

_INK, _FAINT, _ABSENT, _DEAD = "#30353b", "#8a9099", "#f0f1f3", "#d1622b"
_COLOURS = ("#e9f0f9", "#9dbce2", "#3b6fb6", "#173a6b")
_CELL = 0.3
"""The height and the least width of a cell, in inches."""
_WIDEST = 16.0
_DECADES = 30.0
"""Numbers that span more than this factor are coloured by their order of magnitude."""
_WRITTEN = 14
"""The most columns that have room for their numbers."""


@dataclass(frozen=True)
class Panel:
    """One map."""

    title: str
    values: Mapping[str, float]
    """From module path to a number."""
    form: str = ".2g"
    """How a number is written."""
    least_high: float = 0.0
    """The darkest colour stands for this at least, so that noise about zero stays pale."""


@dataclass(frozen=True)
class Grid:
    """Where each module path stands."""

    rows: tuple[str, ...]
    """The names of the rows."""
    columns: tuple[str, ...]
    """The numbers of the layers; the last is empty when there are modules outside of them."""
    places: Mapping[str, tuple[int, int]]
    """From path to (row, column)."""


def grid(paths: Sequence[str]) -> Grid:
    """Sort module paths by layer and kind: the layer is the first number of a path, the kind is the rest.

    >>> grid(["h.0.attn.q", "h.1.attn.q", "head"]).rows
    ("q", "head")
    """
    split = {path: _split(path) for path in paths}
    kinds = list(dict.fromkeys(kind for kind, _ in split.values()))
    numbers = sorted({number for _, number in split.values() if number is not None})
    columns = [str(number) for number in numbers]
    if any(number is None for _, number in split.values()):
        columns.append("")
    places = {
        path: (kinds.index(kind), len(columns) - 1 if number is None else numbers.index(number))
        for path, (kind, number) in split.items()
    }
    return Grid(_short(kinds), tuple(columns), places)


def _split(path: str) -> tuple[tuple[str, ...], int | None]:
    parts = path.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return (tuple(parts), None) if at is None else ((*parts[:at], *parts[at + 1 :]), int(parts[at]))


def _short(kinds: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """As few last words of each kind as tell all of them apart."""
    for length in range(1, max(map(len, kinds), default=1) + 1):
        names = tuple(".".join(kind[-length:]) for kind in kinds)
        if len(set(names)) == len(names):
            return names
    return tuple(".".join(kind) for kind in kinds)


def spectrum_map(spectrum: AdapterSpectrum, path: Path, *, title: str) -> None:
    """Draw the size and the effective rank of every update; dead layers are crossed.

    Args:
        spectrum: the adapter.
        path: a file name that ends in .png.
        title: stands above.

    Raises:
        UsageError, DiskError: see ``heat_map``.
    """
    layers = spectrum.layers
    known = {layer.path: layer.relative_norm for layer in layers if layer.relative_norm is not None}
    if len(known) == len(layers):
        size = Panel("norm of the update, as a share of the weight's", known, form=".1%")
    else:
        size = Panel("norm of the update", {layer.path: layer.update_norm for layer in layers})
    rank = Panel("effective rank", {layer.path: layer.effective_rank for layer in layers}, form=".1f")
    heat_map([size, rank], path, title=title, crossed=spectrum.dead)


def overlap_map(overlap: AdapterOverlap, path: Path, *, title: str) -> None:
    """Draw how far two adapters read from and write to the same directions; layers where one is zero are crossed.

    The colour is φ above chance, ``(φ - chance) / (1 - chance)``: 0 for random directions and 1 for the same ones,
    whatever the rank and the width of a layer.

    Args:
        overlap: the two adapters.
        path: a file name that ends in .png.
        title: stands above.

    Raises:
        UsageError, DiskError: see ``heat_map``.
    """
    known = [layer for layer in overlap.layers if layer.phi_in is not None and layer.phi_out is not None]
    panels = [
        Panel(
            f"what both {verb}: φ above chance, 0 for random directions, 1 for the same",
            {layer.path: _above(getattr(layer, f"phi_{side}"), getattr(layer, f"chance_{side}")) for layer in known},
            least_high=0.25,
        )
        for verb, side in (("read from", "in"), ("write to", "out"))
    ]
    zero = [layer.path for layer in overlap.layers if layer.phi_in is None]
    heat_map(panels, path, title=title, crossed=zero)


def _above(phi: float, chance: float) -> float:
    return (phi - chance) / (1 - chance) if chance < 1 else phi


def heat_map(panels: Sequence[Panel], path: Path, *, title: str, crossed: Collection[str] = ()) -> None:
    """Draw maps below each other into a PNG file.

    Colours run from zero to the largest number, or over orders of magnitude where the numbers do.

    Args:
        panels: at least one, with at least one number.
        path: a file name that ends in .png.
        title: stands above.
        crossed: module paths to cross out, whose numbers have no colour.

    Raises:
        UsageError: there is nothing to draw, or the name ends otherwise.
        DiskError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_name(path)
    if not any(panel.values for panel in panels):
        raise UsageError("There is nothing to draw: no layer has an update.")
    found = grid(list(dict.fromkeys([name for panel in panels for name in panel.values] + list(crossed))))
    width = min(_WIDEST, max(6.5, 2.6 + len(found.columns) * _CELL * (1.6 if _written(found) else 1.0)))
    height = 0.7 + len(panels) * (0.75 + len(found.rows) * _CELL)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=12, fontweight="bold")
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        _draw(figure, axes, panel, found, set(crossed))
    write_whole(path.parent, {path.name: lambda beside: figure.savefig(beside, format="png")})


def check_name(path: Path) -> None:
    """Refuse a file name that is not a picture's.

    Raises:
        UsageError: it does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"The plot {str(path)!r} would be a PNG file; give a name that ends in .png.")


def _written(found: Grid) -> bool:
    return len(found.columns) <= _WRITTEN


def _draw(figure: Any, axes: Any, panel: Panel, found: Grid, crossed: Collection[str]) -> None:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    cells = np.full((len(found.rows), len(found.columns)), np.nan)
    there = cells.copy()
    for name in (*panel.values, *crossed):
        there[found.places[name]] = 0.0
    for name, value in panel.values.items():
        if name not in crossed:
            cells[found.places[name]] = value
    norm = _colouring(cells[~np.isnan(cells)], panel.least_high)
    colours = LinearSegmentedColormap.from_list("veneer", _COLOURS)
    axes.imshow(there, cmap=_flat(_ABSENT), aspect="auto", interpolation="nearest")
    image = axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    for name in crossed:
        row, column = found.places[name]
        axes.plot(column, row, marker="x", color=_DEAD, markersize=6, markeredgewidth=1.6)
    if _written(found):
        _write_numbers(axes, panel, found, cells, norm)
    _dress(axes, panel, found)
    inch = 1 / figure.get_figwidth()
    bar = figure.colorbar(image, cax=axes.inset_axes((1 + 0.15 * inch, 0, 0.16 * inch, 1)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", color=_FAINT, labelcolor=_FAINT, labelsize=8)


def _colouring(known: Any, least_high: float) -> Any:
    """From numbers to the share of the way from the palest to the darkest colour."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if 0 < low * _DECADES < high:
        return LogNorm(low, high)
    return Normalize(0.0, max(high, least_high) or 1.0)


def _flat(colour: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([colour])


def _write_numbers(axes: Any, panel: Panel, found: Grid, cells: Any, norm: Any) -> None:
    for row, column in found.places.values():
        value = cells[row, column]
        if value == value:
            colour = "white" if norm(value) > 0.5 else _INK
            text = format(float(value), panel.form)
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _dress(axes: Any, panel: Panel, found: Grid) -> None:
    axes.set_title(panel.title, loc="left", color=_INK, fontsize=10)
    axes.set_yticks(range(len(found.rows)), found.rows, fontsize=9)
    step = max(1, len(found.columns) // 32 + (len(found.columns) > 32))
    shown = [at for at, name in enumerate(found.columns) if name == "" or at % step == 0]
    axes.set_xticks(shown, [found.columns[at] or "none" for at in shown], fontsize=8)
    axes.set_xlabel("layer", color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, length=0)
    axes.set_xticks([at - 0.5 for at in range(1, len(found.columns))], minor=True)
    axes.set_yticks([at - 0.5 for at in range(1, len(found.rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
