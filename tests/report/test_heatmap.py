"""Heat maps: where each module stands, and that the picture shows what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from veneer.core.errors import DiskError, UsageError
from veneer.core.records import AdapterOverlap, AdapterSpectrum, LayerOverlap, LayerSpectrum
from veneer.report import heatmap
from veneer.report.heatmap import Panel, grid, heat_map


def test_a_path_is_a_layer_and_a_kind() -> None:
    found = grid(["model.layers.0.attn.q", "model.layers.10.attn.q", "model.layers.2.mlp.up", "lm_head"])
    assert found.rows == ("q", "up", "lm_head")
    assert found.columns == ("0", "2", "10", "")
    assert found.places == {
        "model.layers.0.attn.q": (0, 0),
        "model.layers.10.attn.q": (0, 2),
        "model.layers.2.mlp.up": (1, 1),
        "lm_head": (2, 3),
    }


@pytest.mark.parametrize(
    ("paths", "rows"),
    [
        (["encoder.layers.0.q", "decoder.layers.0.q"], ("encoder.layers.q", "decoder.layers.q")),
        (["block.0.layer.0.attn.q", "block.0.layer.1.cross.q"], ("attn.q", "cross.q")),
        (["h.0.moe.0.up", "h.0.moe.1.up"], ("0.up", "1.up")),
        (["head"], ("head",)),
        ([], ()),
    ],
)
def test_rows_have_the_shortest_names_that_tell_them_apart(paths: list[str], rows: tuple[str, ...]) -> None:
    assert grid(paths).rows == rows


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def _has(pixels: np.ndarray, colour: str) -> int:
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(-1) <= 2).sum())


def test_the_picture_shows_the_numbers(tmp_path: Path) -> None:
    # One value at each end of the colours, nothing at the fourth place.
    values = {"h.0.q": 0.0, "h.1.q": 4.0, "h.0.v": 4.0}
    heat_map([Panel("numbers", values)], tmp_path / "a.png", title="t")
    pixels = _pixels(tmp_path / "a.png")
    pale, dark = _has(pixels, heatmap._COLOURS[0]), _has(pixels, heatmap._COLOURS[-1])
    assert 1.7 < dark / pale < 2.3
    assert _has(pixels, heatmap._DEAD) == 0
    heat_map([Panel("numbers", values)], tmp_path / "b.png", title="t", crossed=["h.1.q", "h.1.v"])
    crossed = _pixels(tmp_path / "b.png")
    assert _has(crossed, heatmap._DEAD) > 20
    assert _has(crossed, heatmap._ABSENT) > pale
    assert _has(crossed, heatmap._COLOURS[-1]) < 0.7 * dark


@pytest.mark.parametrize(
    "values",
    [{"a": 0.0}, {"h.0.q": 1e-6, "h.1.q": 1.0}, {f"h.{n}.q": float(n) for n in range(80)}, {"h.0.q": -1.0}],
)
def test_any_numbers_can_be_drawn(tmp_path: Path, values: dict[str, float]) -> None:
    heat_map([Panel("one", values), Panel("two", values, least_high=0.5)], tmp_path / "deep" / "a.png", title="t")
    assert _pixels(tmp_path / "deep" / "a.png").shape[1] <= 16 * 150


def test_orders_of_magnitude_are_coloured_as_such() -> None:
    near, far = heatmap._colouring(np.array([1.0, 20.0]), 0.0), heatmap._colouring(np.array([0.01, 1.0]), 0.0)
    assert (float(near(10.0)), float(far(0.1))) == (0.5, 0.5)
    assert float(heatmap._colouring(np.array([0.01]), 0.5)(0.25)) == 0.5


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a name that ends in \.png"):
        heat_map([Panel("x", {"a": 1.0})], tmp_path / "a.jpg", title="t")
    with pytest.raises(UsageError, match="nothing to draw"):
        heat_map([Panel("x", {})], tmp_path / "a.png", title="t")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(DiskError):
        heat_map([Panel("x", {"a": 1.0})], tmp_path / "a.png", title="t")


def spectrum(path: str, norm: float, *, relative: float | None = None, dead: bool = False) -> LayerSpectrum:
    return LayerSpectrum(path, (4, 4), 2, 1.0, 1.0, 1.0, norm, relative, (norm,), 1.5, 1, 1, 2, dead)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Panel]:
    """The panels that are drawn."""
    found: list[Panel] = []
    real = heatmap._draw

    def draw(figure: Any, axes: Any, panel: Panel, *rest: Any) -> None:
        found.append(panel)
        real(figure, axes, panel, *rest)

    monkeypatch.setattr(heatmap, "_draw", draw)
    return found


@pytest.mark.parametrize("relative", [None, 0.1])
def test_an_adapters_map(tmp_path: Path, relative: float | None, drawn: list[Panel]) -> None:
    layers = (spectrum("h.0.q", 2.0, relative=relative), spectrum("h.1.q", 0.0, relative=relative, dead=True))
    heatmap.spectrum_map(AdapterSpectrum(layers, True, 2.0), tmp_path / "a.png", title="t")
    assert [panel.title.partition(",")[0] for panel in drawn] == ["norm of the update", "effective rank"]
    assert drawn[0].values == ({"h.0.q": 0.1, "h.1.q": 0.1} if relative else {"h.0.q": 2.0, "h.1.q": 0.0})
    assert drawn[1].values == {"h.0.q": 1.5, "h.1.q": 1.5}
    assert _has(_pixels(tmp_path / "a.png"), heatmap._DEAD)


def test_an_overlaps_map(tmp_path: Path, drawn: list[Panel]) -> None:
    layers = (
        LayerOverlap("h.0.q", (2, 2), 0.5, (10.0,), (10.0,), 0.6, 0.2, 0.2, 0.2),
        LayerOverlap("h.1.q", (2, 0), 0.0, (), (), None, None, 0.2, 0.2),
    )
    overlap = AdapterOverlap(layers, (), (), 0.5, 0.6, 0.2, 0.2, 0.2)
    heatmap.overlap_map(overlap, tmp_path / "a.png", title="t")
    assert drawn[0].values == {"h.0.q": pytest.approx(0.5)}
    assert drawn[1].values == {"h.0.q": 0.0}
