"""Tables for people: rich renderables from records and plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from veneer.core.records import MatchReport, MergeReport, ModuleRecord


def megabytes(count: float) -> str:
    """A size in bytes, with a unit that keeps it readable.

    >>> megabytes(538_090_408)
    '538.1 MB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def table(*columns: str, title: str | None = None, numbers: Sequence[str] = ()) -> Table:
    """An empty table in the house's style.

    Args:
        columns: the headings.
        title: stands above it.
        numbers: headings of columns that hold numbers, set flush right.
    """
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        right = column in numbers
        made.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return made


def facts(rows: Mapping[str, Any], *, title: str | None = None) -> Table:
    """Names and values, one a line."""
    made = Table(title=title, box=None, show_header=False, title_justify="left", title_style="bold", pad_edge=False)
    made.add_column(style="cyan", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(name, Text(_shown(value)))
    return made


def sections(parts: Mapping[str, Mapping[str, Any]]) -> Group:
    """Several titled lists of facts, a blank line between them."""
    rendered: list[RenderableType] = []
    for title, rows in parts.items():
        rendered += [facts(rows, title=title), ""]
    return Group(*rendered[:-1])


def adaptable_table(modules: Sequence[ModuleRecord]) -> Table:
    """The modules that can be adapted, those of one name, kind and shape in one row."""
    made = table(
        "name", "kind", "out x in", "modules", "parameters", title="Can be adapted", numbers=("modules", "parameters")
    )
    groups: dict[tuple[str, str, tuple[int, int]], list[int]] = {}
    for module in modules:
        if module.kind is not None and module.shape is not None:
            key = (module.path.rpartition(".")[2], module.kind, module.shape)
            groups.setdefault(key, []).append(module.parameters)
    for (name, kind, (rows, columns)), sizes in groups.items():
        made.add_row(name, kind, f"{rows:,} x {columns:,}", str(len(sizes)), f"{sum(sizes):,}")
    return made


def pattern_table(report: MatchReport) -> Table:
    """What each pattern of a config matched."""
    made = table("field", "pattern", "modules", "matched", title="Patterns", numbers=("modules",))
    for match in report.patterns:
        made.add_row(match.role, Text(match.pattern), str(len(match.paths)), Text(_folded_names(match.paths)))
    return made


def target_table(report: MatchReport) -> Group:
    """What a config adapts, layers alike in one row, and the sums."""
    headings = ("name", "kind", "out x in", "r", "alpha", "scaling", "modules", "parameters")
    made = table(*headings, title="Adapted", numbers=("r", "alpha", "scaling", "modules", "parameters"))
    alike = Counter(
        (t.path.rpartition(".")[2], t.kind, t.shape, t.r, t.lora_alpha, t.scaling, t.parameters) for t in report.targets
    )
    for (name, kind, (rows, columns), r, alpha, scaling, parameters), count in alike.items():
        made.add_row(
            name,
            kind,
            f"{rows:,} x {columns:,}",
            str(r),
            f"{alpha:g}",
            f"{scaling:.4g}",
            str(count),
            f"{parameters * count:,}",
        )
    rest: dict[str, Any] = {f"trained whole: {path}": f"{count:,} parameters" for path, count in report.saved}
    rest |= {f"trained rows: {path}": f"{count:,} parameters" for path, count in report.rows}
    if report.biases:
        rest["biases of the base"] = f"{report.biases:,} parameters"
    if report.scaling_note:
        rest["scaling"] = report.scaling_note
    share = report.trainable / report.total if report.total else 0.0
    rest["trainable"] = f"{report.trainable:,} of {report.total:,} parameters ({share:.3%})"
    return Group(made, facts(rest))


def merge_table(report: MergeReport, output: str) -> Table:
    """What was merged, and how its outputs compare with the unmerged ones."""
    rows: dict[str, Any] = {"merged": ", ".join(report.adapters), "layers": report.layers, "dtype": report.dtype}
    if report.into != "full":
        rows["into"] = f"the quantised base, {report.into}"
    if report.max_logit_difference is None or report.logit_scale is None:
        rows["verified"] = False
    else:
        rows["largest difference of a logit"] = f"{report.max_logit_difference:.3g}"
        rows["largest logit"] = f"{report.logit_scale:.3g}"
        share = report.max_logit_difference / report.logit_scale if report.logit_scale else 0.0
        rows["relative"] = f"{share:.2g}"
    rows["held in memory"] = "one tensor at a time" if report.streamed else "the whole model"
    rows["most memory"] = megabytes(report.peak_memory)
    return facts({**rows, "written to": output})


def per_label_table(figures: Mapping[str, Mapping[str, float]]) -> Table:
    """Precision, recall and F1 of each label, and how many examples have it."""
    made = table("label", "precision", "recall", "F1", "examples", numbers=("precision", "recall", "F1", "examples"))
    for name, row in figures.items():
        shares = [f"{row[key]:.3f}" for key in ("precision", "recall", "f1")]
        made.add_row(Text(name), *shares, f"{row['examples']:,.0f}")
    return made


def side_by_side(answers: Mapping[str, str], *, prompt: str | None = None) -> RenderableType:
    """Answers to one prompt in panels beside each other, in the given order."""
    made = Table(box=None, show_header=False, pad_edge=False, expand=True)
    for _ in answers:
        made.add_column(ratio=1, overflow="fold")
    made.add_row(
        *(Panel(Text(text or "(nothing)"), title=Text(name), title_align="left") for name, text in answers.items())
    )
    return made if prompt is None else Group(Text(prompt, style="bold"), made)


def _folded_names(paths: Sequence[str]) -> str:
    """Paths with their numbers replaced by a star, each shape once."""
    folded = dict.fromkeys(".".join("*" if part.isdigit() else part for part in path.split(".")) for path in paths)
    return ", ".join(folded)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)
