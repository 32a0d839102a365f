"""Tables: what they hold, and that they line up."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from veneer.core.records import (
    MatchReport,
    MergeReport,
    ModuleRecord,
    PatternMatch,
    TargetRecord,
)
from veneer.report import tables


def shown(thing: RenderableType, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(thing)
    return stream.getvalue()


def target(path: str, r: int = 8) -> TargetRecord:
    return TargetRecord(path, "linear", (64, 32), r, 16, 16 / r, r * 96)


REPORT = MatchReport(
    patterns=(PatternMatch("target_modules", "q_proj", ("layers.0.q_proj", "layers.1.q_proj")),),
    targets=(target("layers.0.q_proj"), target("layers.1.q_proj"), target("layers.2.q_proj", r=4)),
    saved=(("score", 1000),),
    biases=10,
    base_parameters=100_000,
)


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1500, "1.5 kB"), (538_090_408, "538.1 MB"), (25.3e9, "25.3 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert tables.megabytes(count) == text


def test_patterns_are_folded() -> None:
    assert "layers.*.q_proj" in shown(tables.pattern_table(REPORT))


def test_layers_alike_share_a_row() -> None:
    text = shown(tables.target_table(REPORT))
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("q_proj")]
    assert [(row[-5], row[-2], row[-1]) for row in rows] == [("8", "2", "1,536"), ("4", "1", "384")]
    assert "trained whole: score" in text
    assert f"{REPORT.trainable:,} of {REPORT.total:,}" in text


def test_what_can_be_adapted() -> None:
    modules = [
        ModuleRecord("", "Model", None, None, 300),
        ModuleRecord("a.q_proj", "Linear", "linear", (10, 10), 100),
        ModuleRecord("b.q_proj", "Linear", "linear", (10, 10), 100),
        ModuleRecord("norm", "Norm", None, None, 100),
    ]
    text = shown(tables.adaptable_table(modules))
    assert "norm" not in text
    (row,) = [line.split() for line in text.splitlines() if line.strip().startswith("q_proj")]
    assert row[-2:] == ["2", "200"]


def test_a_merge_and_facts() -> None:
    report = MergeReport(("a", "b"), 8, "bfloat16", 0.25, 10.0, True, 2_500_000_000)
    text = shown(tables.merge_table(report, "./out"))
    assert "a, b" in text
    assert "0.025" in text
    assert "one tensor at a time" in text
    assert "2.5 GB" in text
    assert "verified" not in text
    text = shown(tables.merge_table(MergeReport(("a",), 8, "float32", None, None, False, 0), "./out"))
    assert ["verified", "no"] in [line.split() for line in text.splitlines()]
    assert "the whole model" in text
    facts = shown(tables.sections({"memory": {"total": 3, "free": None}, "device": {"on": True, "gpus": []}}))
    assert facts.index("memory") < facts.index("total") < facts.index("device")
    assert "yes" in facts
    assert "none" in facts


def test_answers_beside_each_other_keep_markup_as_text() -> None:
    text = shown(tables.side_by_side({"before": "a [bold] list", "after": ""}, prompt="[x]"))
    assert "a [bold] list" in text
    assert "(nothing)" in text
    assert text.splitlines()[0].strip() == "[x]"
    assert "before" in text.splitlines()[1]
    assert "after" in text.splitlines()[1]
