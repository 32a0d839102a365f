"""What a run can say about its task. Light to import, so that the run's config takes its fields from here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from veneer.core.errors import ConfigError, listed

Problem = Literal["auto", "single", "multi", "regression"]
Pooling = Literal["auto", "mean", "cls", "last"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Choices that have a meaning for some tasks; each has its default where it has none."""

    labels: str | None = None
    """The names of the labels in their order, as in negative,positive; without it, those of the training data."""
    problem: Problem = "auto"
    """What is told of a text or image: one label, any number of them, or a number; auto goes by the training data."""
    class_weights: str | None = None
    """How much each label counts in the loss: balanced (rare ones more), or as in spam=5,other=1."""
    stride: int = 128
    """Tokens that the windows of a context too long for one sequence have in common; of question_answering."""
    prefix: str | None = None
    """Text to put before every source, as T5 wants: "translate English to German: "."""
    languages: str | None = None
    """From which language to which, as in en-de, by the data's or tokenizer's names; for speech de, or de-en."""
    judge_by: str | None = None
    """What answers are judged by, as in bleu,chrf; without it, what is customary for the task."""
    database: str | None = None
    """The file of SQLite that answers are executed on, when they are judged by sql_execution."""
    pooling: Pooling = "auto"
    """How a text's vector is made of its tokens': mean, cls (the first) or last; auto as the model's folder says."""
    code: str | None = None
    """The Python file with a model and a loss of your own, which is run; of task other."""

    def refuse(self, task: str, *meaningful: str) -> None:
        """Refuse options that were changed and mean nothing to a task.

        Raises:
            ConfigError: there are some.
        """
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default and f.name not in meaningful]
        if changed:
            raise ConfigError(f"{listed(changed)} has no meaning for task {task}; leave it out.")
