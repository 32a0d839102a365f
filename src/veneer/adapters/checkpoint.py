"""The parameters of a pretrained model by name, read from its files one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
from torch import Tensor, nn

from veneer.core.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """One weight file of a model."""

    path: Path
    """A safetensors file."""
    names: Mapping[str, str]
    """From the key of a tensor to the name of its parameter; tensors that are not in it are of no use."""


@final
class Checkpoint:
    """What a model's files hold. A tensor is read when it is asked for, and not kept.

    Args:
        model: the model, which may be on the meta device; it says which parameters are one under several names.
        shards: its files.
    """

    def __init__(self, model: nn.Module, shards: Sequence[Shard]) -> None:
        self._homes = {name: (shard, key) for shard in shards for key, name in shard.names.items()}
        self._open: dict[str, Any] = {}
        groups: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        self._aliases = {
            name: next((other for other in names if other in self._homes), name)
            for names in groups.values()
            for name in names
        }

    def __contains__(self, name: str) -> bool:
        return self._home(name) in self._homes

    def names(self) -> list[str]:
        """The names that the files hold, one for each tensor."""
        return list(self._homes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter; its values are not read."""
        file, key = self._place(name)
        return tuple(file.get_slice(key).get_shape())

    def read(self, name: str) -> Tensor:
        """A parameter's values, in the dtype of the file.

        Raises:
            UsageError: the files do not hold it, or one of them is broken.
        """
        file, key = self._place(name)
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def _home(self, name: str) -> str:
        return name if name in self._homes else self._aliases.get(name, name)

    def _place(self, name: str) -> tuple[Any, str]:
        home = self._home(name)
        if home not in self._homes:
            raise UsageError(f"The model's files hold no {name!r}.")
        shard, key = self._homes[home]
        path = str(shard.path)
        if path not in self._open:
            try:
                self._open[path] = safetensors.safe_open(path, framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise UsageError(f"{path!r} is not a complete safetensors file: {error}.") from None
        return self._open[path], key


@contextlib.contextmanager
def lent(module: nn.Module, leaf: str, values: Tensor) -> Iterator[None]:
    """Give a module on the meta device the values of one parameter, for the length of a ``with`` block."""
    empty = module._parameters[leaf]
    try:
        module._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        yield
    finally:
        module._parameters[leaf] = empty


def fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model on the meta device its values where they lie in the files.

    They are mapped, not copied: the system reads what is used, and lets go of it again when memory is short. Buffers
    that no file holds stay empty, so the model can be read and not be run.
    """
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            name = f"{path}.{leaf}" if path else leaf
            if parameter is not None and parameter.is_meta and name in checkpoint:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(checkpoint.read(name), requires_grad=False)
                module._parameters[leaf] = made[id(parameter)]
