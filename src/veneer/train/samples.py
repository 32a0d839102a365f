"""Answers that a model gives while it learns: the same held-out prompts again and again, before and now."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from veneer.core.errors import ConfigError, DataError
from veneer.data.encode import Encoded
from veneer.data.rows import Row
from veneer.tasks.sampling import Sampling
from veneer.tasks.task import AbstractTask, Goals
from veneer.tasks.writing import AbstractWriter, question, write
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from veneer.train.prepare import Plan


@final
@dataclass(frozen=True)
class Sample:
    """One prompt with what was written."""

    origin: str
    """Where it stands in the held-out data."""
    asked: str
    """The question."""
    reference: str | None
    """The right answer, where there is one."""
    before: str
    """What the model wrote before it was trained."""
    now: str
    """What it writes now."""


def prompts(
    config: RunConfig, task: AbstractTask, rows: Iterable[Row], processor: Any, limit: int | None
) -> list[Encoded]:
    """The first held-out prompts that leave room for an answer, each once: as many as a run's config asks for.

    Args:
        config: of the run.
        task: as it was fitted.
        rows: held out; bad ones are passed over.
        processor: the tokenizer, or what has it.
        limit: the most tokens of prompt and answer together; None for no limit.

    Raises:
        ConfigError: the task writes no answers, nothing is held out, or no prompt is short enough.
    """
    if not config.samples:
        return []
    if not isinstance(task, AbstractWriter):
        raise ConfigError("samples are answers that a model writes, and models of this task write none; leave it out.")
    found: dict[str, Encoded] = {}
    seen = False
    for row in rows:
        seen = True
        with contextlib.suppress(DataError):
            (asked,) = task.ask([row], processor, max_length=10**9)
            if limit is None or len(asked.input_ids) + config.sample_tokens <= limit:
                found.setdefault(question(asked), asked)
        if len(found) == config.samples:
            break
    if not seen:
        raise ConfigError("samples are answers to held-out prompts, and nothing is held out; give eval_data.")
    if not found:
        raise ConfigError(
            f"No held-out prompt leaves room for {config.sample_tokens} tokens within {limit}; lower sample_tokens, or "
            "leave samples out."
        )
    return list(found.values())


def goals(task: AbstractTask, count: int) -> Goals:
    """The metrics of a run: those of its task, and with samples those of answers."""
    return {**task.goals, **task.answer_goals} if count and isinstance(task, AbstractWriter) else task.goals


@final
class Samples:
    """The prompts of a run, and what was written before it."""

    def __init__(self, plan: Plan) -> None:
        assert isinstance(plan.task, AbstractWriter)
        self.task, self.asked, self.processor = plan.task, plan.asked, plan.tokenizer
        self.sampling = Sampling(max_new_tokens=plan.config.sample_tokens)
        self.batch_size = plan.config.batch_size
        self.before: list[str] | None = None

    def take(
        self, model: Any, on_share: Callable[[float], object] = lambda share: None
    ) -> tuple[list[Sample], dict[str, float]]:
        """What a model writes now, greedily, and the metrics of these answers."""
        written = write(
            self.task, model, self.asked, self.processor, self.sampling, batch_size=self.batch_size, on_share=on_share
        )
        texts = [one.text for one in written]
        if self.before is None:
            self.before = texts
        found = [
            Sample(example.origin, example.more["asked"], example.more["reference"], before, now)
            for example, before, now in zip(self.asked, self.before, texts, strict=True)
        ]
        known = [one for one in found if one.reference is not None]
        judged = self.task.judge([one.now for one in known], [[str(one.reference)] for one in known]) if known else {}
        return found, judged

    def goes_on_from(self, events: Sequence[dict[str, Any]]) -> None:
        """Take what was written before the run from its log."""
        first = next((event for event in events if event["event"] == "samples"), None)
        if first is not None and len(first["samples"]) == len(self.asked):
            self.before = [one["before"] for one in first["samples"]]


def plain(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Samples as JSON."""
    return [asdict(one) for one in samples]
