"""Kernels in the place of a model's own modules: by what a module computes, never by the name of a model.

Each replacement is an instance's ``forward``; parameters, names and files stay as they are, and ``undo`` takes all
back. A module that the kernels cannot serve at some moment (a second adapter, autocast, hooks, weights that
learn) goes its own way for that call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from veneer.adapters.layer import AdaptedLayer
from veneer.engine.attention import use_rows
from veneer.engine.groups import GroupedLinear, groups_of
from veneer.engine.head import underlying
from veneer.engine.inputs import token_inputs
from veneer.engine.mlps import fused_mlp
from veneer.engine.norms import fused_norm
from veneer.engine.rotation import fused_rotation


@final
@dataclass(frozen=True)
class Kernels:
    """What was put in place."""

    norms: int
    """Root-mean-square norms."""
    mlps: int
    """Gated feed-forward blocks."""
    groups: int
    """Groups of linear layers that read one input."""
    rotations: int
    """Attention layers with rotary embedding."""
    modules: tuple[nn.Module, ...]
    """All modules whose forward is another one now."""
    own_attention: Callable[[], None] | None = None
    """Gives the model its own attention back, where its attention with dropout is another one now."""

    def undo(self) -> None:
        """Give every module its own forward back."""
        for module in self.modules:
            module.__dict__.pop("forward", None)
        if self.own_attention is not None:
            self.own_attention()

    def __str__(self) -> str:
        parts = {
            "norms": self.norms,
            "feed-forward blocks": self.mlps,
            "groups of layers": self.groups,
            "rotary attentions": self.rotations,
        }
        found = [f"{count} {name}" for name, count in parts.items() if count]
        return ", ".join([*found, *(["attention with dropout"] if self.own_attention else [])]) or "nothing"


def use_kernels(model: nn.Module) -> Kernels:
    """Put kernels in the place of all modules of a model that they compute the same as.

    >>> print(use_kernels(model))
    61 norms, 30 feed-forward blocks, 30 groups of layers, 30 rotary attentions

    Args:
        model: a model, adapted or not. Adapters that are added later are served too, but groups are not formed anew.
    """
    bare = underlying(model)
    forwards: dict[nn.Module, Callable[..., Any]] = {}

    def put(find: Callable[[nn.Module], Callable[..., Any] | None]) -> int:
        found = {m: f for m in bare.modules() if not _inside(m) and m not in forwards and (f := find(m)) is not None}
        forwards.update(found)
        return len(found)

    mlps = put(fused_mlp)
    taken = {id(child) for mlp in forwards for child in mlp.children()}
    norms = put(fused_norm)
    rotations = put(fused_rotation)
    groups = [g for g in _groups(bare) if not any(id(layer) in taken for layer in g.layers)]
    for group in groups:
        forwards.update({layer: GroupedLinear(group, number) for number, layer in enumerate(group.layers)})
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    return Kernels(norms, mlps, len(groups), rotations, tuple(forwards), use_rows(bare))


def _inside(module: nn.Module) -> bool:
    """A wrapper is no block of the model, whatever it holds."""
    return isinstance(module, AdaptedLayer)


def _groups(model: Any) -> list[Any]:
    """Groups of a model that reads token ids; none of another, which is not known how to run."""
    if getattr(model, "main_input_name", None) != "input_ids" or model.get_input_embeddings() is None:
        return []
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    inputs = token_inputs(model, ids)
    was_training = model.training
    model.eval()
    try:
        return groups_of(model, lambda: model(**inputs))
    finally:
        model.train(was_training)
