"""A pretrained model opened without loading it: its modules, its weights on demand, a bar for going through them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from veneer.cli.output import console
from veneer.core.errors import NotStreamableError, UsageError
from veneer.core.task_type import TaskType

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from veneer.adapters.checkpoint import Checkpoint


def opened(name: str, model_class: str) -> tuple[PreTrainedModel, Checkpoint]:
    """A model's modules on the meta device, and its weights, which are read when they are asked for.

    Args:
        name: a folder or a hub name in the cache.
        model_class: the transformers class, which may be an auto class.

    Raises:
        UsageError: no such model, or one whose files are not its parameters as they are.
    """
    from veneer.adapters.checkpoint import Checkpoint
    from veneer.tasks.shards import shards, skeleton, weight_files

    try:
        model = skeleton(name, auto_class=model_class)
        return model, Checkpoint(model, shards(model, weight_files(name)))
    except NotStreamableError as error:
        raise UsageError(
            f"{name!r} cannot be read weight by weight: {error}. Load it with transformers, write it with "
            "save_pretrained, and give that folder."
        ) from None


def architecture(config: PretrainedConfig, name: str) -> str:
    """The transformers class that a model was saved as.

    Raises:
        UsageError: its config names none that this transformers has.
    """
    import transformers

    named: list[str] = config.architectures or []
    found = next((candidate for candidate in named if hasattr(transformers, candidate)), None)
    if found is None:
        raise UsageError(
            f"The config of {name!r} names the architectures {named}, of which this transformers has none; write the "
            "model again with save_pretrained."
        )
    return found


def task_of(model_class: str) -> TaskType | None:
    """The task that a transformers class is for, if it is one of those that adapters know."""
    import transformers

    from veneer.tasks.loading import AUTO_CLASSES

    for task, auto in AUTO_CLASSES.items():
        names: Any = getattr(transformers, auto)._model_mapping._model_mapping.values()
        if any(model_class in ([entry] if isinstance(entry, str) else entry) for entry in names):
            return task
    return None


@contextlib.contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is told how many are done, and of how many. Nothing is shown where no terminal is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
