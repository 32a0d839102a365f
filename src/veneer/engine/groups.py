"""Linear layers that read the same input, computed together: found by watching the model run once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.engine.linears import is_linear, member_of
from veneer.kernels.lora_group import lora_group


@final
class Group:
    """Layers of one parent that are called one after the other with one and the same tensor."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def output(self, number: int, x: Tensor) -> Tensor:
        """A layer's output: computed with all others when the first is called, then handed out."""
        if number and self.x is x and number in self.waiting:
            out = self.waiting.pop(number)
            if not self.waiting:
                self.x = None
            return out
        self.x, self.waiting = None, {}
        members = [member_of(layer, x) for layer in self.layers] if number == 0 else [None]
        together = [member for member in members if member is not None]
        if len(together) < len(self.layers):
            layer = self.layers[number]
            alone: Tensor = type(layer).forward(layer, x)
            return alone
        first, *rest = lora_group(x, together)
        self.x, self.waiting = x, dict(enumerate(rest, start=1))
        return first


@final
class GroupedLinear:
    """The forward of one layer of a group."""

    def __init__(self, group: Group, number: int) -> None:
        self.group, self.number = group, number

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.output(self.number, x)


def groups_of(model: nn.Module, run: Callable[[], object]) -> list[Group]:
    """The groups of a model, told from which linear layers get the very same tensor while it runs.

    Args:
        model: left as it is.
        run: runs it once.
    """
    parents = [(parent, [c for c in parent.children() if is_linear(c)]) for parent in model.modules()]
    seen: dict[int, list[tuple[int, nn.Module]]] = {}
    alive: list[Tensor] = []
    hooks = []
    for number, (_, linears) in enumerate(parents):

        def note(module: nn.Module, args: tuple[Any, ...], number: int = number) -> None:
            # Kept alive until the end, so that no two inputs have the same id.
            alive.append(args[0])
            seen.setdefault(number, []).append((id(args[0]), module))

        hooks += [linear.register_forward_pre_hook(note) for linear in linears if len(linears) > 1]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for calls in seen.values():
        by_input: dict[int, list[nn.Module]] = {}
        for key, module in calls:
            by_input.setdefault(key, []).append(module)
        # A layer that is called more than once has no one place in a group.
        once = {id(m) for _, m in calls if sum(other is m for _, other in calls) == 1}
        found += [Group(ms) for ms in by_input.values() if len(ms) > 1 and all(id(m) in once for m in ms)]
    return found
