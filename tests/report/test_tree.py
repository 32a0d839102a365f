"""The module tree: neighbours alike fold into one line, others stay."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from veneer.core.records import ModuleRecord
from veneer.report.tree import module_tree, short


def lines(*modules: ModuleRecord) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=120).print(module_tree(modules))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def layer(number: int, width: int = 4) -> list[ModuleRecord]:
    return [
        ModuleRecord(f"layers.{number}", "Layer", None, None, width * width),
        ModuleRecord(f"layers.{number}.proj", "Linear", "linear", (width, width), width * width),
    ]


def test_layers_fold() -> None:
    head = [ModuleRecord("", "Model", None, None, 64), ModuleRecord("layers", "ModuleList", None, None, 64)]
    found = lines(*head, *(record for number in range(4) for record in layer(number)))
    assert found == [
        "Model  64",
        "└── layers ModuleList  64",
        "    └── 0..3 4 x Layer  64",
        "        └── proj Linear  4 x 4  16  linear",
    ]


def test_a_layer_of_another_shape_stands_alone() -> None:
    head = [ModuleRecord("", "Model", None, None, 0), ModuleRecord("layers", "ModuleList", None, None, 0)]
    found = lines(*head, *layer(0), *layer(1), *layer(2, width=8), *layer(3))
    assert [line.split("── ")[1].split(" ")[0] for line in found if "Layer" in line] == ["0..1", "2", "3"]


def test_neighbours_of_other_names_do_not_fold() -> None:
    twins = [ModuleRecord(name, "Linear", "linear", (4, 4), 16) for name in ("q_proj", "k_proj")]
    assert len(lines(ModuleRecord("", "Model", None, None, 32), *twins)) == 3


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12"), (4100, "4.1k"), (134_515_008, "135M"), (6_738_415_616, "6.74B")]
)
def test_short_counts(count: int, text: str) -> None:
    assert short(count) == text
