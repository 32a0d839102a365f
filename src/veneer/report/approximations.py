"""What an adapter keeps that was written at another rank or in another form: tables of plain records."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from veneer.adapters.extract import LeftOutTensor
from veneer.core.records import ApproximatedLayer
from veneer.report.tables import table


def kept_overall(layers: Sequence[ApproximatedLayer]) -> float:
    """The share of the energy of all updates together that is kept."""
    energies = [(layer.norm or 0.0) ** 2 for layer in layers]
    total = sum(energies)
    return sum(e * layer.kept for e, layer in zip(energies, layers, strict=True)) / total if total else 1.0


def error_overall(layers: Sequence[ApproximatedLayer]) -> float:
    """The relative Frobenius error of all updates together."""
    norms = [layer.norm or 0.0 for layer in layers]
    missed = sum((norm * layer.error) ** 2 for norm, layer in zip(norms, layers, strict=True))
    total = sum(norm**2 for norm in norms)
    return math.sqrt(missed / total) if total else 0.0


def percent(share: float) -> str:
    """A share as a percentage that is 100 only when less than a millionth is missing.

    >>> percent(0.99997)
    '99.99 %'
    """
    return f"{math.floor(share * 10_000 + 0.01) / 100:.2f} %"


def shown_ranks(layers: Sequence[ApproximatedLayer]) -> str:
    """The rank of the layers, or the lowest and the highest."""
    ranks = sorted({layer.r for layer in layers})
    return f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"


def left_out_table(tensors: Sequence[LeftOutTensor]) -> Table:
    """Tensors that an adapter does not have, those of one name in one row, the numbers of layers replaced by a star."""
    headings = ("tensor", "what", "tensors", "largest change")
    made = table(*headings, title="Changed and not in the adapter", numbers=("tensors", "largest change"))
    groups: dict[tuple[str, str], list[float | None]] = {}
    for tensor in tensors:
        folded = ".".join("*" if part.isdigit() else part for part in tensor.name.split("."))
        groups.setdefault((folded, tensor.how), []).append(tensor.relative)
    for (name, how), changes in groups.items():
        known = [change for change in changes if change is not None]
        made.add_row(name, how, str(len(changes)), f"{max(known):.2%}" if known else "-")
    return made


def approximation_table(layers: Sequence[ApproximatedLayer]) -> Table:
    """The layers with their ranks, and the share of the update's energy that they keep."""
    headings = ("layer", "r before", "r", "|update|", "energy kept", "relative error")
    made = table(*headings, title="Layers", numbers=headings[1:])
    for layer in layers:
        made.add_row(
            layer.path,
            "-" if layer.r_before is None else str(layer.r_before),
            str(layer.r),
            "-" if layer.norm is None else f"{layer.norm:.4g}",
            percent(layer.kept),
            f"{layer.error:.2g}",
        )
    return made
