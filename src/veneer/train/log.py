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
from veneer.train.trackers import IDENTITY_NAME, TENSORBOARD, Trackers

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

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

    def resume(self, **values: Any) -> None:
        """The event ``resume``, as ``start``; the seconds go on from the line before it."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            last = json.loads(self.path.read_text(encoding="utf-8").splitlines()[-1])
            self.began -= last["seconds"]
        self.write("resume", **values, **surroundings())

    def events(self) -> list[dict[str, Any]]:
        """What is in the log by now."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

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
        (self.path.parent / IDENTITY_NAME).unlink(missing_ok=True)
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
    """Two bars, of the run and of the pass or measurement at hand, with loss, rate, speed, memory and time left.

    Args:
        console: where to draw; None shows nothing.
        steps: of the whole run.
        steps_per_pass: of one pass over the data; the second bar counts them.
    """

    def __init__(self, console: Console | None, steps: int, steps_per_pass: int | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            # Narrow, so that the figures beside it fit a terminal of 80 columns.
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=console is None,
        )
        self.steps = steps
        self.per_pass = min(steps_per_pass or steps, steps)
        # Into a file no bar is drawn until its end; a line now and then says how far the run is.
        self.every = max(1, steps // 10)
        self.task = self.bar.add_task("training", total=steps, figures="")
        self.part = self.bar.add_task(self._pass(0), total=self.per_pass, figures="")
        self.done = 0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def update(self, step: int, *, loss: float, learning_rate: float, tokens_per_second: float, memory: int) -> None:
        """Show the state after a step; ``memory`` in bytes."""
        learned = f"loss {loss:.3f}  lr {learning_rate:.1e}"
        spent = f"{tokens_per_second:,.0f} tok/s  {memory / 1e9:.1f} GB"
        self.done = step
        self.bar.update(self.task, completed=step, figures=learned)
        self.bar.update(self.part, figures=spent)
        self.training()
        if not self.bar.console.is_terminal and step % self.every == 0:
            self.note(f"step {step} of {self.steps}: {learned}  {spent}")

    def note(self, text: str) -> None:
        """A line above the bar."""
        if not self.bar.disable:
            self.bar.console.print(text, markup=False)

    def show(self, rendered: RenderableType) -> None:
        """Something drawn above the bar."""
        if not self.bar.disable:
            self.bar.console.print(rendered)

    def training(self) -> None:
        """Let the second bar count the steps of the pass at hand."""
        last = max(0, self.done - 1) // self.per_pass
        within = self.done - last * self.per_pass
        total = min(self.per_pass, self.steps - last * self.per_pass)
        self.bar.update(self.part, description=self._pass(last), total=total, completed=within)

    def measuring(self, share: float) -> None:
        """Let the second bar show how much of the held-out data is measured, in percent."""
        self.bar.update(self.part, description="held out, %", total=100, completed=int(share * 100))

    def _pass(self, number: int) -> str:
        return f"pass {number + 1} of {-(-self.steps // self.per_pass)}"


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
