"""The state of a run on disk, complete and checked: what is needed to go on as if nothing had happened.

A checkpoint is a folder ``checkpoints/step-00000120`` in the run folder:

- ``parameters.safetensors``: what learns, and the model's buffers, by name;
- ``optimiser.safetensors``: the tensors of the optimiser's state, and AdaLoRA's averages;
- ``random.safetensors``: the state of torch's generators, of each process;
- ``state.json``: the rest, and the sha256 of every other file. It is written last, and its own hash stands in
  ``state.sha256``.

Nothing is pickled. The folder is written beside and renamed into place.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer.adapters.model import PeftModel
from veneer.core.disk import write_folder
from veneer.core.errors import TrainingError
from veneer.train.learner import Learner
from veneer.train.progress import Progress
from veneer.train.shards import whole

if TYPE_CHECKING:
    from accelerate import Accelerator

FOLDER = "checkpoints"
FORMAT = 1
_STATE, _SEAL = "state.json", "state.sha256"
_TENSORS = ("parameters.safetensors", "optimiser.safetensors", "random.safetensors")
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and found whole."""

    path: Path
    values: dict[str, Any]
    """What ``state.json`` holds."""
    tensors: dict[str, dict[str, Tensor]]
    """From the name of a file to its tensors."""

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self.values["progress"]["step"])


# Writing


def save(
    folder: Path, learner: Learner, progress: Progress, accelerator: Accelerator, *, about: Mapping[str, Any]
) -> None:
    """Write a checkpoint into a run folder; every process must call it.

    Args:
        folder: the run folder.
        learner: what learns.
        progress: how far the run is.
        accelerator: of the run.
        about: what a resumed run must agree with.

    Raises:
        DiskError: the disk is full or not writable; the checkpoints that were there are still there.
    """
    from accelerate.utils import gather_object

    generators = gather_object([_generators()])
    keep = accelerator.is_main_process
    parameters = {**_buffers(learner.bare), **learner.sharing.learned(keep=keep)}
    tensors, rest = _split(learner.sharing.optimiser_state(keep=keep), keep=keep)
    if not keep:
        return
    files = {
        "parameters.safetensors": parameters,
        "optimiser.safetensors": {**tensors, **_averages(learner.bare)},
        "random.safetensors": {
            f"{process}/{key}": value
            for process, state in enumerate(generators)
            for key, value in state["torch"].items()
        },
    }
    values = {
        "format": FORMAT,
        "about": dict(about),
        "progress": progress.to_dict(),
        "optimiser": rest,
        "schedule": learner.schedule.state_dict(),
        "random": [state["plain"] for state in generators],
        "budgets": _budgets(learner.bare),
    }

    def write(place: Path) -> None:
        for name, content in files.items():
            save_file({key: value.contiguous() for key, value in content.items()}, place / name)
        hashes = {name: _hash(place / name) for name in files}
        text = json.dumps({**values, "sha256": hashes}, indent=1)
        (place / _STATE).write_text(text, encoding="utf-8")
        (place / _SEAL).write_text(_hash(place / _STATE) + "\n", encoding="utf-8")

    write_folder(folder / FOLDER / f"step-{progress.step:08d}", write, replace=True)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that are saved with a model, by name, on the CPU."""
    return {
        f"{prefix}.{key}" if prefix else key: buffer.to("cpu", copy=True)
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


def _generators() -> dict[str, Any]:
    """The state of this process's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{at}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
    plain: dict[str, Any] = {"python": random.getstate()}
    import numpy

    kind, keys, *rest = numpy.random.get_state(legacy=True)
    plain["numpy"] = [kind, keys.tolist(), *rest]
    return {"torch": states, "plain": plain}


def _split(tree: Any, *, keep: bool) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a nested state by path, whole, and the same nesting with their paths in their places."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            full = whole(value.detach())
            if keep:
                tensors[path] = full.to("cpu", copy=True)
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"items": [[key, walk(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [walk(item, f"{path}/{at}") for at, item in enumerate(value)]
        return value

    return tensors, walk(tree, "")


def _joined(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``_split`` took apart."""
    if isinstance(rest, list):
        return [_joined(item, tensors) for item in rest]
    if isinstance(rest, dict) and "tensor" in rest:
        return tensors[rest["tensor"]]
    if isinstance(rest, dict):
        return {key: _joined(item, tensors) for key, item in rest["items"]}
    return rest


def _averages(model: nn.Module) -> dict[str, Tensor]:
    """AdaLoRA's averages of importance, of every adapter that has some."""
    found = {}
    for name, budget in (model.base_model.budgets if isinstance(model, PeftModel) else {}).items():
        for kind, averages in budget.averages().items():
            found |= {f"budget|{name}|{kind}|{path}|{key}": value for (path, key), value in averages.items()}
    return found


def _budgets(model: nn.Module) -> dict[str, Any]:
    """What AdaLoRA's last allocation left, by adapter."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: budget.config.rank_pattern for name, budget in model.base_model.budgets.items()}


# Reading


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first."""
    places = [path for path in (folder / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(places, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def newest(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest whole checkpoint of a run folder, and a sentence for each newer one that is broken."""
    said = []
    for path in checkpoints(folder):
        try:
            return read(path), said
        except TrainingError as error:
            said.append(f"{error} The one before is used.")
    return None, said


def read(path: Path) -> Saved:
    """A checkpoint, each file of it checked against its hash.

    Raises:
        TrainingError: it is broken or incomplete, or of another format.
    """
    try:
        if (path / _SEAL).read_text(encoding="utf-8").strip() != _hash(path / _STATE):
            raise TrainingError(f"The checkpoint {path.name} is broken: {_STATE} is not what was written.")
        values = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise TrainingError(f"The checkpoint {path.name} has format {values['format']}; expected {FORMAT}.")
        for name in _TENSORS:
            if _hash(path / name) != values["sha256"][name]:
                raise TrainingError(f"The checkpoint {path.name} is broken: {name} is not what was written.")
        return Saved(path, values, {name: load_file(path / name) for name in _TENSORS})
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(f"The checkpoint {path.name} is incomplete: {reason}.") from error


def restore(saved: Saved, learner: Learner, accelerator: Accelerator) -> Progress:
    """Put a checkpoint's state into a run that was prepared like the one it is of.

    Returns:
        How far that run was.

    Raises:
        TrainingError: it holds other parameters than the run has.
    """
    values, tensors = saved.values, saved.tensors
    given, buffers = tensors["parameters.safetensors"], dict(learner.bare.named_buffers())
    shapes = {**{name: buffer.shape for name, buffer in buffers.items()}, **learner.sharing.shapes}
    for name, tensor in given.items():
        if shapes.get(name) != tensor.shape:
            raise TrainingError(f"The checkpoint {saved.path.name} has {name}, which this run does not have so.")
    for name in buffers.keys() & given.keys():
        buffers[name].copy_(given[name])
    state = tensors["optimiser.safetensors"]
    learned = {name: tensor for name, tensor in given.items() if name not in buffers}
    learner.sharing.restore(learned, _joined(values["optimiser"], state))
    learner.schedule.load_state_dict(values["schedule"])
    if isinstance(learner.bare, PeftModel):
        _put_budgets(learner.bare, values["budgets"], state)
    _put_generators(values["random"], tensors["random.safetensors"], accelerator)
    return Progress.from_dict(values["progress"])


def _put_budgets(model: PeftModel, patterns: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    from veneer.adapters.budget import RankBudget

    for name, pattern in patterns.items():
        config = model.peft_config[name]
        config.rank_pattern = pattern
        budget = RankBudget(name, config, model.base_model.layers_of(name))  # type: ignore[arg-type]
        model.base_model.budgets[name] = budget
        for key, value in state.items():
            if key.startswith(f"budget|{name}|"):
                _, _, kind, path, leaf = key.split("|")
                budget.averages()[kind][path, leaf] = value.to(budget.device)


def _put_generators(plain: Sequence[Any], tensors: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """With another number of processes the first ones have what they had, and the others draw from their seed."""
    process = accelerator.process_index
    if process >= len(plain):
        return
    torch.set_rng_state(tensors[f"{process}/cpu"])
    for at in range(torch.cuda.device_count()):
        if f"{process}/cuda{at}" in tensors:
            torch.cuda.set_rng_state(tensors[f"{process}/cuda{at}"], at)
    version, keys, gauss = plain[process]["python"]
    random.setstate((version, tuple(keys), gauss))
    import numpy

    kind, numbers, *rest = plain[process]["numpy"]
    numpy.random.set_state((kind, numpy.array(numbers, dtype=numpy.uint32), *rest))


# Keeping


def prune(folder: Path, *, keep: int, every: int | None) -> None:
    """Remove all but the newest checkpoints; those of steps that ``every`` divides stay."""
    for path in list(_surplus(folder, keep, every)):
        # Renamed first: half a folder is never taken for a checkpoint.
        gone = path.with_name(f".{path.name}.gone")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _surplus(folder: Path, keep: int, every: int | None) -> Iterator[Path]:
    for path in checkpoints(folder)[keep:]:
        if every is None or int(path.name.removeprefix("step-")) % every:
            yield path


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
