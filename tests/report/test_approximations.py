"""The figures of adapters that were written at another rank, from records made by hand."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from veneer.adapters.extract import LeftOutTensor
from veneer.core.records import ApproximatedLayer
from veneer.report.approximations import (
    approximation_table,
    error_overall,
    kept_overall,
    left_out_table,
    percent,
    shown_ranks,
)

LAYERS = (
    ApproximatedLayer("a.q_proj", 8, 2, norm=3.0, kept=0.9, error=math.sqrt(0.1)),
    ApproximatedLayer("a.v_proj", None, 4, norm=4.0, kept=1.0, error=0.0),
)


def shown(renderable: object) -> str:
    screen = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    screen.print(renderable)
    screen.file.close()
    return screen.export_text()


def test_sums_weigh_layers_by_their_energy() -> None:
    assert kept_overall(LAYERS) == pytest.approx((9 * 0.9 + 16) / 25)
    assert error_overall(LAYERS) == pytest.approx(math.sqrt(9 * 0.1 / 25))
    assert 1 - error_overall(LAYERS) ** 2 == pytest.approx(kept_overall(LAYERS))


def test_nothing_to_keep() -> None:
    zeros = (ApproximatedLayer("a", 2, 1, norm=0.0), ApproximatedLayer("b", 2, 1))
    assert (kept_overall(zeros), error_overall(zeros)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.00 %"), (1 - 1e-9, "100.00 %"), (0.99999, "99.99 %"), (0.95, "95.00 %"), (0.0, "0.00 %")],
)
def test_a_hundred_percent_is_all(share: float, text: str) -> None:
    assert percent(share) == text


def test_ranks() -> None:
    assert shown_ranks(LAYERS) == "2 to 4"
    assert shown_ranks(LAYERS[:1]) == "2"


def test_the_table_of_layers() -> None:
    text = shown(approximation_table(LAYERS))
    assert "a.q_proj" in text
    assert "90.00 %" in text
    assert "0.32" in text
    assert text.splitlines()[5].split()[1] == "-"


def test_tensors_of_one_name_are_one_row() -> None:
    tensors = [LeftOutTensor(f"layers.{n}.norm.weight", "changed", 0.01 * n) for n in range(3)]
    tensors += [LeftOutTensor("head.weight", "only in the tuned model", None)]
    text = shown(left_out_table(tensors))
    assert "layers.*.norm.weight" in text
    assert "2.00%" in text
    assert [line.split()[-2] for line in text.splitlines() if "weight" in line] == ["3", "1"]
