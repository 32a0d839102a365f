"""Runs side by side, read from their folders: what each was, how far it came, and how its loss fell."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from veneer.core.errors import UsageError
from veneer.report.tables import megabytes, table

_CONFIG, _LOG = "run.yaml", "log.jsonl"

FIGURES = ("state", "steps", "best loss", "training loss", "tokens/s", "most memory", "duration")
"""What ``compare_table`` shows of each run below its config."""


@dataclass(frozen=True)
class Run:
    """A run folder, as far as its run came."""

    name: str
    """What tells it from the runs beside it."""
    folder: str
    """Where it is."""
    state: str
    """finished, interrupted, failed, running, killed (its process is gone), or unfinished (on another machine)."""
    model: str | None
    """The base model's name."""
    method: str
    """What is trained, and for an adapter its family and rank."""
    steps: int
    """Optimiser steps so far."""
    planned_steps: int | None
    """Optimiser steps of the whole run."""
    best_loss: float | None
    """The lowest held-out loss after any step."""
    train_loss: float | None
    """The mean training loss over the last tenth of the lines so far."""
    tokens_per_second: float | None
    """Tokens read a second."""
    peak_memory: int | None
    """The most memory held, in bytes."""
    seconds: float
    """From the run's beginning to its last sign of life."""
    config: dict[str, Any]
    """The fields of ``run.yaml``."""


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run's log. A last line that was cut off, as by a kill, is left out.

    Raises:
        UsageError: there is no log, or another line of it that cannot be read.
    """
    path = folder / _LOG
    if not path.is_file():
        raise UsageError(f"{str(folder)!r} has no {_LOG}; expected a run folder that veneer train wrote.")
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    events = []
    for number, line in enumerate([*lines, rest] if _is_json(rest) else lines, start=1):
        if not _is_json(line):
            raise UsageError(f"{path}:{number} is not a line of JSON.")
        events.append(json.loads(line))
    return events


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Every run in some folders and below them, in the order of their paths.

    Raises:
        UsageError: a folder that is not there, no run in any, or a log that cannot be read.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"There is no folder {str(folder)!r}; expected a run folder, or one with runs in it.")
        found += [path.parent for path in sorted(folder.rglob(_CONFIG)) if (path.parent / _LOG).is_file()]
    places = list(dict.fromkeys(found))
    if not places:
        where = ", ".join(repr(str(folder)) for folder in folders)
        raise UsageError(f"There is no run in {where}; a run folder has a {_CONFIG} and a {_LOG}.")
    return [_read(place, name) for place, name in zip(places, _names(places), strict=True)]


def _names(places: Sequence[Path]) -> list[str]:
    """As few last parts of each path as tell all of them apart."""
    parts = [place.resolve().parts for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str) -> Run:
    import yaml

    try:
        config = yaml.safe_load((folder / _CONFIG).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{str(folder / _CONFIG)!r} is not readable as YAML: {reason}.") from None
    events = read_events(folder)
    start = next((event for event in events if event["event"] == "start"), {})
    steps = [event for event in events if event["event"] == "step"]
    last = steps[-1] if steps else {}
    held_out = [e["loss"] for e in events if e["event"] == "eval" and e["step"] and e.get("loss") is not None]
    losses = [event["loss"] for event in steps if event.get("loss") is not None]
    recent = losses[-max(1, len(losses) // 10) :]
    model = start.get("model") or config.get("model")
    return Run(
        name=name,
        folder=str(folder),
        state=_state(events, start),
        model=Path(model).name if model else None,
        method=_method(config),
        steps=last.get("step", 0),
        planned_steps=start.get("steps"),
        best_loss=min(held_out, default=None),
        train_loss=sum(recent) / len(recent) if recent else None,
        tokens_per_second=last.get("tokens_per_second"),
        peak_memory=last.get("memory"),
        seconds=max((event["seconds"] for event in events), default=0.0),
        config=config,
    )


def _method(config: dict[str, Any]) -> str:
    if config.get("method") != "lora":
        return str(config.get("method"))
    quantised = f", {config['quantize']}" if config.get("quantize") else ""
    family = "dora" if config.get("use_dora") else config.get("family", "lora")
    return f"{family} r={config.get('r')}{quantised}"


def _state(events: Sequence[dict[str, Any]], start: dict[str, Any]) -> str:
    begins = ("start", "resume")
    start = next((event for event in reversed(events) if event["event"] in begins), start)
    last = next((event for event in reversed(events) if event["event"] in (*begins, "end", "error")), start)
    if last.get("event") == "end":
        return "interrupted" if last.get("interrupted") else "finished"
    if last.get("event") == "error":
        return "failed"
    if start.get("host") != platform.node() or "process" not in start:
        return "unfinished"
    return "running" if _alive(start["process"]) else "killed"


def _alive(process: int) -> bool:
    if os.name == "nt":
        # There, signal 0 ends the process.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def runs_table(runs: Sequence[Run]) -> Table:
    """One run a line; the lowest held-out loss in bold. A model that all share stands above, which saves its column."""
    models = {run.model or "no model named" for run in runs}
    numbers = ("steps", "best loss", "tokens/s", "memory", "time")
    headings = ("run", "state", "method", *(["model"] if len(models) > 1 else []), *numbers)
    made = table(*headings, title=None if len(models) > 1 else f"Runs of {escape(models.pop())}", numbers=numbers)
    for column in made.columns[1:3]:
        column.no_wrap = True
    best = min((run.best_loss for run in runs if run.best_loss is not None), default=None)
    for run in runs:
        loss = _loss(run.best_loss)
        made.add_row(
            escape(run.name),
            run.state,
            run.method,
            *([escape(run.model or "-")] if "model" in headings else []),
            _steps(run),
            f"[bold green]{loss}[/]" if run.best_loss is not None and run.best_loss == best else loss,
            _count(run.tokens_per_second),
            megabytes(run.peak_memory) if run.peak_memory else "-",
            duration(run.seconds),
        )
    return made


def differing(runs: Sequence[Run]) -> list[str]:
    """The config fields in which runs differ, their output aside, in the config's order."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    return [
        name
        for name in names
        if name != "output" and any(run.config.get(name) != runs[0].config.get(name) for run in runs)
    ]


def compare_table(runs: Sequence[Run]) -> Table:
    """One run a column: the config fields that differ, then the figures."""
    names = [escape(run.name) for run in runs]
    made = table("", *names, numbers=names)
    for name in differing(runs):
        made.add_row(name, *(escape(_value(run.config.get(name))) for run in runs))
    made.add_section()
    columns = [_figures(run) for run in runs]
    for row, name in enumerate(FIGURES):
        made.add_row(name, *(column[row] for column in columns))
    return made


def _figures(run: Run) -> tuple[str, ...]:
    memory = megabytes(run.peak_memory) if run.peak_memory else "-"
    speed, time = _count(run.tokens_per_second), duration(run.seconds)
    return (run.state, _steps(run), _loss(run.best_loss), _loss(run.train_loss), speed, memory, time)


def duration(seconds: float) -> str:
    """Seconds, shortly.

    >>> duration(3725)
    '1h02m'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def _steps(run: Run) -> str:
    return f"{run.steps:,}" if run.steps == run.planned_steps else f"{run.steps:,} of {run.planned_steps or '?'}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _value(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
