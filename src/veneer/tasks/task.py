"""What a task is: everything that training and evaluation ask about the kind of data and its loss.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.core import registry
from veneer.core.errors import ConfigError, nearest
from veneer.core.task_type import TaskType
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.sources import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tally:
    """Sums over supervised units (tokens, for language), so that batches of any size add up exactly."""

    loss: float = 0.0
    """The sum of the units' losses, in nats."""
    units: int = 0
    """How many units."""
    correct: int = 0
    """How many of them the model's first choice got right."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.loss + other.loss, self.units + other.units, self.correct + other.correct)


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one batch."""

    total: Tensor
    """The sum of the units' losses, a scalar with a graph behind it."""
    tally: Tally
    """The same as numbers."""


@dataclass(frozen=True)
class Piece:
    """A stretch of an example's text."""

    text: str
    trained: bool
    """Whether its tokens are trained."""


class AbstractTask(ABC):
    """A kind of task. A file ``tasks/<name>.py`` defines the final class ``Task``; it holds no state."""

    auto_class: ClassVar[str]
    """The transformers auto class that loads a model with the right head."""
    task_type: ClassVar[TaskType]
    """What the adapter's config says the model is for."""
    packs: ClassVar[bool]
    """Whether its examples can be laid end to end."""
    goals: ClassVar[Mapping[str, Literal["min", "max"]]]
    """From each metric to whether it is to be small or large."""

    @abstractmethod
    def prepare(
        self, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedTokenizerBase, list[str]]:
        """The tokenizer to encode these rows with, and sentences on what had to be done to it.

        Rows may be more than memory holds: they are to be gone through, as often as need be, not kept. Bad ones among
        them are to be passed over; ``encode`` refuses them.
        """

    @abstractmethod
    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        train_on: str,
        truncate: Truncation = "end",
    ) -> EncodedSet:
        """Rows as sequences with labels; what becomes of a row does not depend on the others.

        Raises:
            DataError: a row that is not of this task, or cannot be encoded.
        """

    @abstractmethod
    def collate(
        self, examples: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, *, packed: bool = False
    ) -> dict[str, Tensor]:
        """One batch of tensors, each (B, T) or (B,); ``packed`` lays the examples end to end, where ``packs``."""

    @abstractmethod
    def units(self, batch: dict[str, Tensor]) -> int:
        """How many supervised units a batch has: what its summed loss is to be divided by."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        """Run the model on a batch and sum the loss over its units."""

    @abstractmethod
    def metrics(self, tally: Tally) -> dict[str, float]:
        """Named figures of a whole set, ``loss`` (mean over units, in nats) among them."""

    @abstractmethod
    def preview(self, example: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
        """The text of an example in stretches that are trained or not."""


def names() -> tuple[str, ...]:
    """The keys of all tasks, sorted: the files in this room that are named for a ``TaskType``."""
    return tuple(name for name in registry.names("tasks") if name.upper() in TaskType.__members__)


def get(name: str) -> AbstractTask:
    """The task behind a key.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in names():
        raise ConfigError(f"task is {name!r}; expected one of: {', '.join(names())}.{nearest(name, names())}")
    found: AbstractTask = registry.load("tasks", name).Task()
    return found


def longest_input(model_config: Any) -> int | None:
    """The most tokens that a transformers model takes, where its config says so."""
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def vocabulary(model_config: Any) -> int | None:
    """How many tokens a transformers model has embeddings for, where its config says so."""
    count = getattr(model_config.get_text_config(), "vocab_size", None)
    return count if isinstance(count, int) and count > 0 else None


def measure(
    task: AbstractTask,
    model: nn.Module,
    examples: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    device: torch.device | str,
    packed: bool = False,
    on_share: Callable[[float], object] = lambda share: None,
) -> Tally:
    """The tally of a set of examples, without gradients and without dropout; the model's mode is put back.

    Examples of similar length share a batch, end to end when ``packed``; the figures do not depend on how they are
    batched. ``on_share`` is told the share of the examples that is done, after each batch.
    """
    was_training = model.training
    model.eval()
    total = Tally()
    done = 0
    try:
        with torch.no_grad():
            for group in _by_length(examples, batch_size):
                batch = task.collate(group, tokenizer, packed=packed)
                total += task.loss(model, {key: value.to(device) for key, value in batch.items()}).tally
                done += len(group)
                on_share(done / len(examples))
    finally:
        model.train(was_training)
    return total


def _by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[Encoded]]:
    # By their places: the examples themselves may be more than memory holds.
    ordered = sorted(range(len(examples)), key=lambda at: len(examples[at].input_ids))
    for start in range(0, len(ordered), batch_size):
        yield [examples[at] for at in ordered[start : start + batch_size]]
