"""``README.md`` of a run folder: what was trained, on what, what came of it, and how to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.core.disk import write_text
from veneer.core.records import RunRecord
from veneer.report.runs import duration, read_events
from veneer.report.tables import megabytes

OVERVIEW_NAME = "README.md"

_FILES = {
    "best": "the weights of the best measurement",
    "last": "the weights after the last step",
    "run.yaml": "the config, whole: `veneer train --config run.yaml --output ...` runs it again",
    "result.json": "these figures and more, for programs",
    "log.jsonl": "every step and measurement, one JSON object a line",
    "loss.png": "the curves",
    "confusion.png": "which label was taken for which",
    "checkpoints": "what `veneer train --resume` goes on from",
}


def write_overview(folder: Path, record: RunRecord) -> Path:
    """Write the overview of a run that has ended into its folder.

    Args:
        folder: the run folder, with its log.
        record: what the run did.

    Returns:
        The file's path.

    Raises:
        UsageError: the folder has no log.
        DiskError: the disk is full or not writable.
    """
    events = read_events(folder)
    start = next((event for event in events if event["event"] == "start"), {})
    parts = [f"# {Path(record.model or 'A model').name}, {record.task} by {record.method}", _facts(record, start)]
    if (folder / "loss.png").is_file():
        parts.append("![Loss over the steps](loss.png)")
    if record.held_out_after or record.held_out_before:
        parts += ["## Held out", _metrics(record.held_out_before or {}, record.held_out_after or {})]
    samples = [event for event in events if event["event"] == "samples"]
    if samples:
        parts += ["## Answers", *map(_answer, samples[-1]["samples"])]
    if record.notes:
        parts += ["## What was decided on the way", "\n".join(f"- {note}" for note in record.notes)]
    there = {name: text for name, text in _FILES.items() if (folder / name).exists()}
    parts += ["## In this folder", "\n".join(f"- `{name}`: {text}" for name, text in there.items())]
    path = folder / OVERVIEW_NAME
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def _facts(record: RunRecord, start: Mapping[str, Any]) -> str:
    ended = ", interrupted" if record.interrupted else ""
    rows = {
        "model": record.model or "given by the program",
        "steps": f"{record.steps:,} of {record.planned_steps:,}{ended}",
        "training data": f"{record.data['examples']:,} examples, {record.data['tokens']:,} tokens",
        "held out": f"{record.held_out_data['examples']:,} examples" if record.held_out_data else "nothing",
        "trainable": f"{record.trainable:,} of {record.total:,} parameters ({record.trainable / record.total:.2%})",
        "time": f"{duration(record.seconds)} at {record.tokens_per_second:,.0f} tokens a second",
        "most memory": megabytes(record.peak_memory),
    }
    if "versions" in start:
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows.items())])


def _metrics(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    lines = ["| metric | before | after |", "|---|---|---|"]
    for name in dict.fromkeys([*before, *after]):
        first, last = (f"{one[name]:.4f}" if name in one else "-" for one in (before, after))
        lines.append(f"| {name.replace('_', ' ')} | {first} | {last} |")
    return "\n".join(lines)


def _answer(sample: Mapping[str, Any]) -> str:
    rows = {"asked": sample["asked"], "before": sample["before"], "now": sample["now"]}
    if sample.get("reference") is not None:
        rows["expected"] = sample["reference"]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows.items())])


def _cell(text: str) -> str:
    """Text within a table of Markdown: as it is, on one line, and without a mark that would end the cell."""
    quoted = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"')
    return quoted.replace("|", "\\|").replace("<", "&lt;")
