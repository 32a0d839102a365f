"""The log of a run: one JSON object a line, and a progress bar for whoever is watching."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, final

import torch

from veneer.core.errors import DiskError
from veneer.train.surroundings import surroundings
from veneer.train.trackers import TENSORBOARD, Trackers

if TYPE_CHECKING:
    from rich.console import Console

LOG_NAME = "log.jsonl"


@final
class RunLog:
    """Appends events to ``log.jsonl``, each line on disk before the next step begins, and passes them to trackers.

    Args:
        folder: the run folder.
        trackers: finished when the log is left as a context.
    """

    def __init__(self, folder: Path, trackers: Trackers | None = None) -> None:
        self.path = folder / LOG_NAME
        self.trackers = trackers
        self.began = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.trackers is not None:
            self.trackers.finish()

    def start(self, **values: Any) -> None:
        """The event ``start``, with what the run is on: versions, machine, process."""
        self.write("start", **values, **surroundings())

    def write(self, event: str, **values: Any) -> None:
        """Append one event with the seconds since the run began; a number that is not finite is written as null.

        Raises:
            DiskError: the line cannot be written.
        """
        line = {"event": event, "seconds": round(time.perf_counter() - self.began, 3), **finite(values)}
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DiskError(f"Could not write {self.path}: {error.strerror or error}.") from error
        if self.trackers is not None:
            self.trackers.log(event, values)

    def undo(self) -> None:
        """Remove the log, and the folder if nothing else is in it."""
        self.__exit__(None, None, None)
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.path.parent / TENSORBOARD, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()


def finite(value: Any) -> Any:
    """The value with null for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@final
class ProgressBar:
    """Steps, loss, tokens a second, peak memory and time left; shows nothing without a console."""

    def __init__(self, console: Console | None, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            # Narrow, so that the figures beside it fit a terminal of 80 columns.
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=console is None,
        )
        self.steps = steps
        # Into a file no bar is drawn until its end; a line now and then says how far the run is.
        self.every = max(1, steps // 10)
        self.task = self.bar.add_task("training", total=steps, figures="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_second: float, memory: int) -> None:
        """Show the state after a step; ``memory`` in bytes."""
        figures = f"loss {loss:.3f}  {tokens_per_second:,.0f} tok/s  {memory / 1e9:.1f} GB"
        self.bar.update(self.task, completed=step, figures=figures)
        if not self.bar.console.is_terminal and step % self.every == 0:
            self.note(f"step {step} of {self.steps}: {figures}")

    def note(self, text: str) -> None:
        """A line above the bar."""
        if not self.bar.disable:
            self.bar.console.print(text, markup=False)

    def doing(self, what: str) -> None:
        """What the run is busy with."""
        self.bar.update(self.task, description=what)


def peak_memory() -> int:
    """The most bytes this process has held so far: on the GPU when there is one, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
