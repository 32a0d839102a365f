"""Tables of what adapters are made of, and of how two of them lie to each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from veneer.core.records import AdapterOverlap, AdapterSpectrum, LayerSpectrum
from veneer.report.tables import facts, table

_SPECTRUM_LEGEND = (
    "update: the change of the weight, scaling included. effective rank: exp of the entropy of the singular values "
    "divided by their sum. 90 %, 95 %, 99 %: how many singular values hold that share of the energy, the sum of their "
    "squares. dead: zero, or under a thousandth of the median."
)
_OVERLAP_LEGEND = (
    "cosine: of the two updates as vectors. in, out: what the updates read from and write to. φ: the share of the "
    "smaller space that lies in the other, 0 to 1; by chance: what random directions have on average. angle: the "
    "smallest principal angle, in degrees."
)


def spectrum_table(spectrum: AdapterSpectrum) -> Group:
    """Every layer with its norm and ranks, the layers of one name summed up, and what the columns mean."""
    relative = any(layer.relative_norm is not None for layer in spectrum.layers)
    numbers = ["r", "scaling", "|update|", *(["of |W|"] if relative else [])]
    numbers += ["effective rank", "90 %", "95 %", "99 %"]
    made = table("layer", *numbers, "", title="Layers", numbers=numbers)
    for layer in spectrum.layers:
        cells = [str(layer.r), f"{layer.scaling:.4g}", f"{layer.update_norm:.4g}"]
        if relative:
            cells.append("-" if layer.relative_norm is None else f"{layer.relative_norm:.2%}")
        cells += [f"{layer.effective_rank:.1f}", str(layer.rank_90), str(layer.rank_95), str(layer.rank_99)]
        made.add_row(layer.path, *cells, Text("dead", style="red") if layer.dead else "")
    return Group(made, _by_name(spectrum.layers), "", Text(_SPECTRUM_LEGEND, style="dim"), "")


def _by_name(layers: Sequence[LayerSpectrum]) -> Table:
    """The medians over the layers of one name: which kinds of module learned the most, and at which rank."""
    numbers = ("layers", "r", "|update|", "effective rank", "99 %", "dead")
    made = table("name", *numbers, title="By name, medians", numbers=numbers)
    groups: dict[str, list[LayerSpectrum]] = {}
    for layer in layers:
        groups.setdefault(layer.path.rpartition(".")[2], []).append(layer)
    for name, alike in groups.items():
        made.add_row(
            name,
            str(len(alike)),
            f"{statistics.median(layer.r for layer in alike):g}",
            f"{statistics.median(layer.update_norm for layer in alike):.4g}",
            f"{statistics.median(layer.effective_rank for layer in alike):.1f}",
            f"{statistics.median(layer.rank_99 for layer in alike):g}",
            str(sum(layer.dead for layer in alike)),
        )
    return made


def overlap_table(overlap: AdapterOverlap) -> Group:
    """Every layer that two adapters both change, all of them together, and what the columns mean."""
    numbers = ("ranks", "cosine", "φ in", "chance in", "φ out", "chance out", "angle in", "angle out")
    shown = ("ranks", "cosine", "φ in", "by chance", "φ out", "by chance", "angle in", "out")
    made = table("layer", *numbers, title="Layers that both change", numbers=numbers)
    for column, heading in zip(made.columns[1:], shown, strict=True):
        column.header = heading
    for layer in overlap.layers:
        made.add_row(
            layer.path,
            f"{layer.ranks[0]}, {layer.ranks[1]}",
            f"{layer.cosine:+.3f}",
            _share(layer.phi_in),
            _share(layer.chance_in),
            _share(layer.phi_out),
            _share(layer.chance_out),
            f"{layer.angles_in[0]:.1f}" if layer.angles_in else "-",
            f"{layer.angles_out[0]:.1f}" if layer.angles_out else "-",
        )
    together = {
        "cosine of all layers together": f"{overlap.cosine:+.3f}",
        "φ in, mean": f"{_share(overlap.phi_in)}, by chance {_share(overlap.chance_in)}",
        "φ out, mean": f"{_share(overlap.phi_out)}, by chance {_share(overlap.chance_out)}",
        "layers that both change": len(overlap.layers),
        "only the first": len(overlap.only_first),
        "only the second": len(overlap.only_second),
    }
    return Group(made, facts(together), "", Text(_OVERLAP_LEGEND, style="dim"), "")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
