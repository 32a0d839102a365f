"""Gradient checkpointing layer by layer: what the first N layers keep is their input, and the rest is computed again.

The first layers are the ones to choose: when the backward pass comes to them, what the later ones kept is gone, so that
computing one of them again adds nothing to the peak. Layers are transformers' own ``GradientCheckpointingLayer``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from veneer.core.errors import ConfigError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model that can be checkpointed one by one, in the order of its modules."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check(model: nn.Module, count: int | None) -> None:
    """Refuse what ``checkpoint_layers`` cannot do.

    Raises:
        ConfigError: the model supports no checkpointing, or has fewer such layers than ``count``.
    """
    name = type(model).__name__
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{name} does not support gradient checkpointing; leave checkpoint=off.")
    found = len(blocks(model))
    if count is not None and not 0 <= count <= found:
        raise ConfigError(f"checkpoint is {count}, but {name} has {found} layers that can be checkpointed.")


def checkpoint_layers(model: Any, count: int | None = None) -> None:
    """Compute what the first layers keep again in the backward pass; losses and gradients are the same bit for bit.

    >>> checkpoint_layers(model, 8)  # in front of any training loop, also transformers' Trainer
    >>> checkpoint_layers(model, 0)  # as before

    Args:
        model: a transformers model, adapted or not.
        count: how many layers from the first on; None is all of them, 0 none.

    Raises:
        ConfigError: see ``check``.
    """
    check(getattr(model, "get_base_model", lambda: model)(), count)
    with warnings.catch_warnings():
        # transformers renamed these within version 5; the old names work in all of 5.
        warnings.simplefilter("ignore", FutureWarning)
        if count == 0:
            model.gradient_checkpointing_disable()
            return
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if count is not None:
        for number, block in enumerate(blocks(model)):
            block.gradient_checkpointing = number < count


@final
@dataclass(frozen=True)
class Kept:
    """Bytes that the forward pass of one batch keeps for its backward."""

    layers: tuple[int, ...]
    """By each layer, its input included."""
    inputs: tuple[int, ...]
    """By each layer when it is checkpointed."""
    rest: int
    """Outside of the layers: embeddings, head and loss."""

    def peak(self, count: int) -> int:
        """The most that is alive with ``count`` layers checkpointed: all that is kept, and one layer being computed."""
        return self.rest + max(self.layers, default=0) + sum(self.inputs[:count]) + sum(self.layers[count:])

    def needed(self, room: int) -> int:
        """The fewest layers to checkpoint so that the peak is at most ``room`` bytes; all, if even that is too much."""
        return next((n for n in range(len(self.layers)) if self.peak(n) <= room), len(self.layers))


def measure(model: nn.Module, forward: Callable[[], Any]) -> Kept:
    """What a forward pass keeps, without keeping it: what each layer saves is let go at its end.

    Args:
        model: in training mode, nothing checkpointed.
        forward: runs the model on a batch. The random numbers that it draws are put back.
    """
    found = blocks(model)
    counter = _Counter(model)
    handles = []
    for block in found:
        handles.append(block.register_forward_pre_hook(counter.enter, with_kwargs=True))
        handles.append(block.register_forward_hook(counter.leave))
    try:
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(counter.pack, _never):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return Kept(tuple(counter.layers), tuple(counter.inputs), counter.rest + counter.size())


@final
class _Counter:
    """Counts storages that are saved: each once, and no parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.static = {_place(t) for t in (*model.parameters(), *model.buffers())}
        self.layers: list[int] = []
        self.inputs: list[int] = []
        self.rest = 0
        self.outside: set[int] = set()
        self.held: dict[int, Tensor] = {}

    def size(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.held.values())

    def enter(self, block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.rest += self.size()
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        hidden = given[0] if given else None
        # Positions and masks are shared by all layers; only what flows through is a layer's own.
        self.outside = {_place(tensor) for tensor in given[1:]}
        self.held = {}
        self.inputs.append(0 if hidden is None or not hidden.requires_grad else hidden.untyped_storage().nbytes())

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.layers.append(self.size())
        self.held, self.outside = {}, set()

    def pack(self, tensor: Tensor) -> None:
        place = _place(tensor)
        if place not in self.static and place not in self.outside:
            # Held until the layer ends, so that no later tensor is mistaken for this one.
            self.held[place] = tensor.detach()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _never(_: Any) -> Tensor:
    raise AssertionError("a measuring pass has no backward")
