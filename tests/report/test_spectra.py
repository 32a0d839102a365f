"""Tables of adapters: what they hold, and that they line up."""

from __future__ import annotations

from dataclasses import replace

from tests.report.test_heatmap import spectrum
from tests.report.test_tables import shown
from veneer.core.records import AdapterOverlap, AdapterSpectrum, LayerOverlap
from veneer.report.spectra import overlap_table, spectrum_table


def _row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line.split()


def test_every_layer_has_its_row() -> None:
    layers = (
        spectrum("h.0.q_proj", 1.25),
        replace(spectrum("h.1.q_proj", 0.25), effective_rank=2.5),
        spectrum("h.1.up", 0.0, dead=True),
    )
    text = shown(spectrum_table(AdapterSpectrum(layers, True, 0.75)))
    assert _row(text, "h.0.q_proj") == ["h.0.q_proj", "2", "1", "1.25", "1.5", "1", "1", "2"]
    assert _row(text, "h.1.up")[-1] == "dead"
    assert _row(text, "q_proj") == ["q_proj", "2", "2", "0.75", "2.0", "2", "0"]
    assert _row(text, "up ") == ["up", "1", "2", "0", "1.5", "2", "1"]
    assert "|W|" not in text
    assert "under a thousandth of the median" in " ".join(text.split())


def test_shares_of_the_weight_where_they_are_known() -> None:
    layers = (spectrum("a", 1.0, relative=0.0123), spectrum("b", 1.0))
    text = shown(spectrum_table(AdapterSpectrum(layers, True, 1.0)))
    assert "of |W|" in text
    assert "1.23%" in text


def test_numbers_end_in_one_column() -> None:
    layers = (spectrum("a.q_proj", 1.5), replace(spectrum("a.much.longer.name", 1e-7), r=128))
    lines = shown(spectrum_table(AdapterSpectrum(layers, True, 1.0))).splitlines()
    assert len({len(line.rstrip()) for line in lines if line.strip().startswith("a.")}) == 1


def test_an_overlap() -> None:
    layers = (
        LayerOverlap("h.0.q", (2, 8), 0.5, (10.04, 80.0), (20.0, 30.0), 0.6, 0.25, 0.1, 0.2),
        LayerOverlap("h.1.q", (2, 0), 0.0, (), (), None, None, 0.1, 0.2),
    )
    overlap = AdapterOverlap(layers, ("x",), (), -0.25, 0.6, 0.25, 0.1, 0.2)
    text = shown(overlap_table(overlap))
    wanted = ["h.0.q", "2,", "8", "+0.500", "0.600", "0.100", "0.250", "0.200", "10.0", "20.0"]
    assert _row(text, "h.0.q") == wanted
    assert _row(text, "h.1.q")[4:] == ["-", "0.100", "-", "0.200", "-", "-"]
    assert _row(text, "cosine of all")[-1] == "-0.250"
    assert _row(text, "only the first")[-1] == "1"
    none = replace(overlap, phi_in=None, phi_out=None, chance_in=None, chance_out=None)
    assert "φ in, mean                     -, by chance -" in shown(overlap_table(none))
