"""``task.json`` beside saved weights: the kind of task, and the names of its labels in the order of the outputs."""

from __future__ import annotations

import json
from pathlib import Path

from veneer.core.errors import UsageError
from veneer.tasks import task as tasks
from veneer.tasks.other import coded
from veneer.tasks.task import AbstractTask

TASK_NAME = "task.json"


def text(name: str, task: AbstractTask) -> str:
    """What the file of a task holds."""
    return json.dumps({"task": name, **task.to_dict()}, indent=2, ensure_ascii=False) + "\n"


def kept(folder: str | Path) -> tuple[str, AbstractTask] | None:
    """The task that weights in a folder were trained for, with its name; None where nothing says so.

    Raises:
        UsageError: the file is not what veneer writes.
    """
    path = Path(folder) / TASK_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name = values.pop("task")
        if name not in tasks.names():
            raise ValueError(f"there is no task {name!r}")
        return name, tasks.get(name).restored(values)
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{str(path)!r} does not describe a task: {error}.") from None


def task_for(name: str | None, adapter: Path | None, model: str, code: str | None = None) -> tuple[str, AbstractTask]:
    """The task to use a model for, with its name: as the weights say, else as the model's config describes it.

    Args:
        name: the task that was asked for; None goes by the weights, and takes ``causal_lm`` where they say nothing.
        adapter: an adapter's folder.
        model: the base model's folder, or its name on the hub.
        code: the user's own file, of task other.

    Raises:
        UsageError: the weights are for another task.
        ConfigError: an unknown task, or one that nothing describes.
    """
    from veneer.tasks.loading import load_config

    for folder in (adapter, Path(model).expanduser()):
        found = kept(folder) if folder is not None else None
        if found is not None and name not in (None, found[0]):
            raise UsageError(f"{str(folder)!r} was trained for task {found[0]}, not {name}; leave --task out.")
        if found is not None:
            return found[0], coded(found[1], code)
    chosen = name or "causal_lm"
    task = coded(tasks.get(chosen), code)
    return chosen, task.described(load_config(model)) if task.pretrained else task
