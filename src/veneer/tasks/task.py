"""What a task is: everything that training and evaluation ask about the kind of data and its loss.

Shape legend: B examples, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from veneer.core import registry
from veneer.core.errors import ConfigError, nearest
from veneer.core.task_type import TaskType
from veneer.data.encode import Encoded, EncodedSet, Truncation
from veneer.data.rows import Row
from veneer.tasks.options import TaskOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from veneer.tasks.program import Program

Goals = Mapping[str, Literal["min", "max"]]
"""From each metric to whether it is to be small or large."""

Prediction = dict[str, Any]
"""What a model says of one example, as it is written to a file of JSON lines."""


@dataclass(frozen=True)
class Tally:
    """Sums over supervised units (tokens for language, examples for classes), so that batches add up exactly."""

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
    outputs: Any = None
    """What the model gave, for ``AbstractTask.read``; None where predictions are not made of it."""


@dataclass(frozen=True)
class Piece:
    """A stretch of an example's text."""

    text: str
    trained: bool
    """Whether its tokens are trained."""


@dataclass(frozen=True)
class Measured:
    """What a model does on a set of examples."""

    tally: Tally
    metrics: dict[str, float]
    """By name, ``loss`` (mean over units) among them."""
    details: dict[str, Any]
    """What is no single number, as a confusion matrix."""


class AbstractTask(ABC):
    """A kind of task. A file ``tasks/<name>.py`` defines the final class ``Task``, made without arguments.

    What a task learns from its training data (the names of labels) is in the one that ``fitted`` returns; it goes
    with the weights (``to_dict``, ``restored``).
    """

    auto_class: ClassVar[str]
    """The transformers auto class that loads a model with the right head."""
    task_type: ClassVar[TaskType]
    """What the adapter's config says the model is for."""
    packs: ClassVar[bool]
    """Whether its examples can be laid end to end."""
    columns: ClassVar[tuple[str, ...]]
    """Every column that is understood."""
    keeps: ClassVar[bool] = True
    """Whether a row says all that becomes of it, so that encoded data may be kept; not where it names a file."""
    least: ClassVar[int] = 1
    """The fewest examples of a batch from which something can be learned: more where they are compared."""

    pretrained: ClassVar[bool] = True
    """Whether its models are transformers'."""
    program: ClassVar[Program | None] = None
    """The user's code that makes them where they are not."""

    @property
    @abstractmethod
    def goals(self) -> Goals:
        """The metrics there are; known once the task is fitted."""

    @abstractmethod
    def fitted(self, rows: Iterable[Row], options: TaskOptions, config: PretrainedConfig | None) -> AbstractTask:
        """The task as these training rows, a run's options and the model's config, if there is one, make it.

        Rows may be more than memory holds; they are gone through once.

        Raises:
            ConfigError: an option that has no meaning for the task.
            DataError: rows from which it cannot be told.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """What was fitted, as JSON."""

    @abstractmethod
    def restored(self, values: Mapping[str, Any]) -> AbstractTask:
        """The task of what ``to_dict`` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """

    @abstractmethod
    def described(self, config: PretrainedConfig) -> AbstractTask:
        """The task as the config of a model describes it that was trained elsewhere.

        Raises:
            ConfigError: the config does not say enough.
        """

    @abstractmethod
    def model_options(self) -> dict[str, Any]:
        """What to hand to ``from_pretrained`` beside the name: the number and names of labels, for instance."""

    @abstractmethod
    def check(self, row: Row, *, labelled: bool = True) -> None:
        """Whether a row is of this task; with ``labelled`` false, what is to be told of it may be missing.

        Raises:
            DataError: it is not; the row is named.
        """

    @abstractmethod
    def prepare(self, rows: Iterable[Row], processor: Any) -> tuple[Any, list[str]]:
        """The tokenizer or processor to encode these rows with, and sentences on what had to be done to it.

        Rows may be more than memory holds: they are to be gone through, as often as need be, not kept. Bad ones among
        them are to be passed over; ``encode`` refuses them.
        """

    @abstractmethod
    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        *,
        max_length: int,
        train_on: str,
        truncate: Truncation = "end",
        labelled: bool = True,
    ) -> EncodedSet:
        """Rows as sequences with labels; without, when they are only to be predicted.

        What becomes of a row does not depend on the others.

        Raises:
            DataError: a row that is not of this task, or cannot be encoded.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Encoded], processor: Any, *, packed: bool = False) -> dict[str, Tensor]:
        """One batch of tensors, each (B, T) or (B,); ``packed`` lays the examples end to end, where ``packs``."""

    @abstractmethod
    def units(self, batch: dict[str, Tensor]) -> int:
        """How many supervised units a batch has: what its summed loss is to be divided by."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> BatchLoss:
        """Run the model on a batch and sum the loss over its units."""

    @abstractmethod
    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        """The predictions in a model's outputs for a batch; none where they are written token by token."""

    @abstractmethod
    def metrics(self, tally: Tally, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, float]:
        """Named figures of a whole set, ``loss`` (mean over units, in nats) among them: those of ``goals``."""

    @abstractmethod
    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        """What else there is to say of a whole set, as JSON."""

    @abstractmethod
    def preview(self, example: Encoded, processor: Any) -> list[Piece]:
        """The text of an example in stretches that are trained or not."""

    def config(self, name_or_path: str) -> PretrainedConfig | None:
        """The config of a model; None where it has none.

        Raises:
            UsageError: there is none that can be read.
        """
        from veneer.tasks.loading import load_config

        return load_config(name_or_path) if self.pretrained else None

    def processor(self, name_or_path: str) -> Any:
        """The tokenizer or processor that stands beside a model.

        Raises:
            UsageError: there is none.
        """
        from veneer.tasks.loading import load_processor

        if self.program is not None:
            return self.program.processor(name_or_path)
        return load_processor(name_or_path, self.auto_class)

    def model(
        self,
        name_or_path: str,
        *,
        dtype: str = "float32",
        quantize: str | None = None,
        brought: Collection[str] | None = None,
    ) -> PreTrainedModel:
        """A pretrained model with this task's head.

        Args:
            name_or_path: a folder or hub name.
            dtype: the precision to load it in.
            quantize: how to store its linear layers.
            brought: the modules that an adapter will bring; None is for training, which makes a head that is not
                there, or that was for other labels.

        Raises:
            ConfigError: the model has a head for the same labels in another order.
            UsageError: no such model, or one that has no such head.
        """
        if self.program is not None:
            return cast("PreTrainedModel", self.program.model(name_or_path, dtype=dtype, quantize=quantize))
        from veneer.tasks.heads import check_order, head_paths, renewed
        from veneer.tasks.loading import load_config, load_model

        options = self.model_options()
        names, before = list(options.get("id2label", {}).values()), load_config(name_or_path)
        if names and brought is None:
            check_order(before, names)
        model = load_model(
            name_or_path,
            auto_class=self.auto_class,
            dtype=dtype,
            quantize=quantize,
            elsewhere=lambda loaded: head_paths(loaded) if brought is None else brought,
            **options,
        )
        if names and brought is None:
            renewed(model, before, names)
        return model


class AbstractWindows(AbstractTask):
    """A task whose rows may be several sequences each: windows of a text that is too long for one."""

    @abstractmethod
    def join(self, readings: Sequence[Prediction]) -> Prediction:
        """A row's prediction from what ``read`` gives of each of its windows."""


def windows_of(examples: Sequence[Encoded]) -> list[list[int]]:
    """The places of each row's sequences, rows in the order of their first ones."""
    found: dict[str, list[int]] = {}
    for at, example in enumerate(examples):
        found.setdefault(example.origin, []).append(at)
    return list(found.values())


def names() -> tuple[str, ...]:
    """The keys of all tasks, sorted: the files in this room that are named for a ``TaskType``."""
    known = {member.lower().replace("_2_", "2") for member in TaskType.__members__}
    return tuple(name for name in registry.names("tasks") if name in known)


def get(name: str) -> AbstractTask:
    """The task behind a key.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in names():
        raise ConfigError(f"task is {name!r}; expected one of: {', '.join(names())}.{nearest(name, names())}")
    found: AbstractTask = registry.load("tasks", name).Task()
    return found


def measure(
    task: AbstractTask,
    model: nn.Module,
    examples: Sequence[Encoded],
    processor: Any,
    *,
    batch_size: int,
    device: torch.device | str,
    packed: bool = False,
    on_share: Callable[[float], object] = lambda share: None,
) -> Measured:
    """A model's figures on a set of examples, without gradients and without dropout; its mode is put back.

    Examples of similar length share a batch, end to end when ``packed``; the figures do not depend on how they are
    batched. ``on_share`` is told the share of the examples that is done, after each batch.
    """
    total = Tally()
    seen: list[Encoded] = []
    predictions: list[Prediction] = []
    done = 0
    for places, result in _passed(task, model, examples, processor, batch_size, device, packed):
        group = [examples[at] for at in places]
        total += result.tally
        read = task.read(result.outputs, group, processor)
        predictions += read
        # What is only counted is not kept: it may be more than memory holds.
        seen += group if read else []
        done += len(group)
        on_share(done / len(examples))
    return Measured(total, task.metrics(total, predictions, seen), task.details(predictions, seen))


def predict(
    task: AbstractTask,
    model: nn.Module,
    examples: Sequence[Encoded],
    processor: Any,
    *,
    batch_size: int,
    device: torch.device | str,
    on_share: Callable[[float], object] = lambda share: None,
) -> list[Prediction]:
    """What a model says of each example, in their order, with its place under "origin"; of windows, of each row."""
    found: dict[int, Prediction] = {}
    for places, result in _passed(task, model, examples, processor, batch_size, device, packed=False):
        found.update(zip(places, task.read(result.outputs, [examples[at] for at in places], processor), strict=True))
        on_share(len(found) / len(examples))
    if isinstance(task, AbstractWindows):
        rows = windows_of(examples)
        return [{"origin": examples[row[0]].origin, **task.join([found[at] for at in row])} for row in rows]
    return [{"origin": example.origin, **found[at]} for at, example in enumerate(examples)]


def _passed(
    task: AbstractTask,
    model: nn.Module,
    examples: Sequence[Encoded],
    processor: Any,
    batch_size: int,
    device: torch.device | str,
    packed: bool,
) -> Iterator[tuple[list[int], BatchLoss]]:
    """Every example through the model once, those of similar length together: their places, and what came of them."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            # By their places: the examples themselves may be more than memory holds.
            order = sorted(range(len(examples)), key=lambda at: len(examples[at].input_ids))
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                batch = task.collate([examples[at] for at in places], processor, packed=packed)
                yield places, task.loss(model, {key: value.to(device) for key, value in batch.items()})
    finally:
        model.train(was_training)
