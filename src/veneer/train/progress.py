"""How far a run is: everything about it that changes from step to step, but for what learns."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, final

from veneer.tasks.task import Tally
from veneer.train.config import RunConfig

FIRST_STEPS = 5
"""Steps whose losses say what an untrained loss is."""


@final
@dataclass
class Progress:
    """The counters of a run."""

    step: int = 0
    """Optimiser steps taken; with it the place in the data is known, see ``batches``."""
    tokens: int = 0
    """Tokens read."""
    seconds: float = 0.0
    """Time spent on steps, without measurements and saving."""
    recent: deque[Tally] = field(default_factory=deque)
    """The last steps, a tenth of the run."""
    unlogged: Tally = field(default_factory=Tally)
    """Steps since the last line of the log."""
    before: dict[str, float] | None = None
    """Held-out metrics before the first step."""
    after: dict[str, float] | None = None
    """The latest held-out metrics."""
    measured_at: int = -1
    """The step of the latest held-out metrics."""
    best: dict[str, float] | None = None
    """The best held-out metrics."""
    best_step: int | None = None
    """Their step."""
    stale: int = 0
    """Measurements since the best."""
    worst_first: float = 0.0
    """The highest loss of the first steps, in nats."""
    log_bytes: int = 0
    """The size of the log when this was written to a checkpoint."""

    @classmethod
    def of(cls, steps: int) -> Self:
        """That of a run of so many steps, before the first."""
        return cls(recent=deque(maxlen=max(1, steps // 10)))

    def take(self, tally: Tally, *, tokens: int, seconds: float) -> None:
        """Count a step in."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.recent.append(tally)
        self.unlogged += tally

    def explodes(self, loss: float, factor: float | None) -> bool:
        """Whether a step's mean loss is beyond all that an untrained model has; the first steps say what that is."""
        if self.step < FIRST_STEPS:
            self.worst_first = max(self.worst_first, loss)
            return False
        return factor is not None and loss > factor * self.worst_first

    def judge(self, metrics: dict[str, float], config: RunConfig, *, lower: bool) -> bool:
        """Take held-out metrics in.

        Args:
            metrics: by name.
            config: which of them decides, and by how much it has to be better.
            lower: whether a lower value is the better one.

        Returns:
            Whether they are the best so far.
        """
        self.after, self.measured_at = metrics, self.step
        value = metrics[config.best_metric]
        best = math.nan if self.best is None else self.best[config.best_metric]
        gain = best - value if lower else value - best
        if not math.isnan(best) and not gain > config.min_delta:
            self.stale += 1
            return False
        if math.isnan(value):
            return False
        self.best, self.best_step, self.stale = metrics, self.step, 0
        return True

    def tired(self, patience: int | None) -> bool:
        """Whether so many measurements brought nothing better."""
        return patience is not None and self.stale >= patience

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; ``from_dict`` gives the same back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        recent = [asdict(tally) for tally in self.recent]
        return {**plain, "recent": recent, "kept": self.recent.maxlen, "unlogged": asdict(self.unlogged)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """See ``to_dict``."""
        plain = dict(values)
        recent = deque((Tally(**tally) for tally in plain.pop("recent")), maxlen=plain.pop("kept"))
        return cls(**{**plain, "recent": recent, "unlogged": Tally(**plain["unlogged"])})
