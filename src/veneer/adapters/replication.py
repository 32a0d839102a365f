"""A deeper model out of its own layers (``layer_replication``).

``[[0, 4], [2, 5]]`` makes of layers 0 to 4 the layers 0, 1, 2, 3, 2, 3, 4. Every copy is a module of its own over the
same parameters, so it costs no memory, while an adapter on it, or a merge into it, reaches it alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from torch import nn

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.index import ModuleIndex, lies_in
from veneer.core.config import LoraConfig, PeftConfig
from veneer.core.errors import ConfigError, UsageError, listed

_NAMES = ("layers", "layer", "h")
_COUNT = "num_hidden_layers"
_TYPES = "layer_types"


@final
class Replication:
    """The layers of a model put together anew, and what is needed to take it back."""

    def __init__(self, adapted: AdaptedModel, ranges: Sequence[Sequence[int]]) -> None:
        """Find the layers and check the ranges; nothing changes yet.

        Raises:
            ConfigError: the model has not one list of layers that its config counts, or fewer than the ranges name.
        """
        self.ranges = [list(each) for each in ranges]
        self.path, self.parent, self.name = _find(adapted)
        self.before: nn.ModuleList = self.parent._modules[self.name]  # type: ignore[assignment]
        self.index = adapted.index
        self.order = [number for start, end in self.ranges for number in range(start, end)]
        if max(self.order) >= len(self.before):
            raise ConfigError(
                f"layer_replication has {self.ranges}, but {self.path!r} has {len(self.before)} layers, 0 to "
                f"{len(self.before) - 1}; an end is the number after the last layer."
            )
        self.types = getattr(self.parent.config, _TYPES, None)

    def apply(self, adapted: AdaptedModel) -> None:
        """Put the copies in the place of the layers, and count them in the model's config."""
        layers = nn.ModuleList([_numbered(_sharing(self.before[i]), n) for n, i in enumerate(self.order)])
        layers.training = self.before.training
        self.parent._modules[self.name] = layers
        self._count(len(layers), self.types and [self.types[number] for number in self.order])
        index = ModuleIndex(adapted.model)
        # Copies are tied by design, and may be changed one by one.
        index.tied = {path: others for path, others in index.tied.items() if not lies_in(path, [self.path])}
        adapted.index = index
        adapted.replication = self

    def undo(self, adapted: AdaptedModel) -> None:
        """Give the model its own layers back, where it now is."""
        after = self.parent._modules[self.name]
        assert isinstance(after, nn.ModuleList)
        device = next(after.parameters()).device
        for number, layer in zip(self.order, after, strict=True):
            for module, twin in zip(self.before[number].modules(), layer.modules(), strict=True):
                module._buffers.update(twin._buffers)
        self.parent._modules[self.name] = self.before.to(device).train(after.training)
        self._count(len(self.before), self.types)
        adapted.index = self.index
        adapted.replication = None

    def settle(self) -> None:
        """Give every copy weights of its own: the model stays as deep as it is."""
        seen: set[int] = set()
        for module in self.parent._modules[self.name].modules():  # type: ignore[union-attr]
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) in seen:
                    # As itself: a quantised weight is more than its values.
                    module._parameters[leaf] = copy.deepcopy(parameter)
                seen.add(id(parameter))

    def _count(self, layers: int, types: Any) -> None:
        setattr(self.parent.config, _COUNT, layers)
        if types is not None:
            setattr(self.parent.config, _TYPES, list(types))


@contextmanager
def replicated(adapted: AdaptedModel, config: PeftConfig, *, ready: bool = False) -> Iterator[None]:
    """Put the layers together as a config says, before its adapter is added; a failure puts them back.

    Args:
        adapted: the model.
        config: the adapter's.
        ready: the adapter was fitted to the layers as they are, so that they have to stay.

    Raises:
        ConfigError: see ``Replication``.
        UsageError: the adapters that are there stand on other layers.
    """
    wanted = config.layer_replication if isinstance(config, LoraConfig) else None
    have = None if adapted.replication is None else adapted.replication.ranges
    if (adapted.peft_config or ready) and wanted != have:
        raise UsageError(
            f"layer_replication is {wanted}, but this model stands at {have}; all adapters of a model need the same "
            "layers."
        )
    if wanted == have:
        yield
        return
    assert wanted is not None
    Replication(adapted, wanted).apply(adapted)
    try:
        yield
    except BaseException:
        if adapted.replication is not None:
            adapted.replication.undo(adapted)
        raise


def _find(adapted: AdaptedModel) -> tuple[str, nn.Module, str]:
    """The path of the list of layers that the model's config counts, the module that holds it, and its name there."""
    found = []
    for path, slot in adapted.index.slots.items():
        parent, name = slot.places[0]
        count = getattr(getattr(parent, "config", None), _COUNT, None)
        if name in _NAMES and isinstance(slot.module, nn.ModuleList) and count == len(slot.module):
            found.append((path, parent, name))
    if len(found) != 1:
        there = f"there are several: {listed(path for path, *_ in found)}" if found else "there is none"
        raise ConfigError(
            "layer_replication needs a model with one list of layers, as long as its config's num_hidden_layers says; "
            f"in {type(adapted.model).__name__} {there}."
        )
    return found[0]


def _sharing(module: nn.Module) -> nn.Module:
    """A copy of a module and all below it over the same parameters."""
    twins: dict[int, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        if id(module) not in twins:
            if "forward" in module.__dict__:
                raise ConfigError(
                    f"layer_replication cannot copy a {type(module).__name__} whose forward was replaced; undo that "
                    "first, for instance a device_map."
                )
            twin = module.__class__.__new__(module.__class__)
            twins[id(module)] = twin
            own = {
                key: copy.copy(value) if isinstance(value, dict | set) else value for key, value in vars(module).items()
            }
            twin.__dict__.update(own)
            twin.__dict__["_modules"] = {
                name: None if child is None else twin_of(child) for name, child in module._modules.items()
            }
        return twins[id(module)]

    return twin_of(module)


def _numbered(layer: nn.Module, number: int) -> nn.Module:
    """The layer, told its place: attention looks up its part of a cache by it."""
    for module in layer.modules():
        if "layer_idx" in module.__dict__:
            module.__dict__["layer_idx"] = number
    return layer
