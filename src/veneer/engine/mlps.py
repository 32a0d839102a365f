"""Gated feed-forward blocks as one kernel: found by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.engine.linears import is_linear, member_of
from veneer.kernels.gated_mlp import Activation, activate, gated_mlp

_ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")


@final
class FusedMLP:
    """The forward of one block. Whatever the kernel cannot do goes the module's own way."""

    def __init__(self, module: nn.Module, layers: tuple[str, str, str], activation: Activation) -> None:
        self.module, self.layers, self.activation = module, layers, activation

    def __call__(self, x: Tensor) -> Tensor:
        gate, up, down = (member_of(self.module._modules[name], x) for name in self.layers)  # type: ignore[arg-type]
        if gate is None or up is None or down is None:
            out: Tensor = type(self.module).forward(self.module, x)
            return out
        return gated_mlp(x, gate, up, down, self.activation)


def fused_mlp(module: nn.Module) -> FusedMLP | None:
    """The fused forward of a module that is ``down(act(gate(x)) * up(x))``; None for any other.

    It is one when it has three linear layers of fitting shapes, an activation that the kernel knows, and gives what
    the kernel gives on random numbers.
    """
    linears = {name: child for name, child in module._modules.items() if child is not None and is_linear(child)}
    others = [child for child in module._modules.values() if child is not None and not is_linear(child)]
    if len(linears) != 3 or any(child._modules or list(child.parameters()) for child in others):
        return None
    if "forward" in module.__dict__ or next(module.parameters()).is_meta:
        return None
    activation = _activation(module)
    if activation is None:
        return None
    for layers in permutations(linears):
        if _fits(layers, linears):
            found = FusedMLP(module, layers, activation)
            if _same(found, linears[layers[0]]):
                return found
    return None


def _fits(layers: tuple[str, ...], linears: dict[str, nn.Module]) -> bool:
    gate, up, down = (tuple(linears[name].weight.shape) for name in layers)  # type: ignore[union-attr,arg-type]
    return gate == up == down[::-1]


def _same(fused: FusedMLP, gate: Any) -> bool:
    """Whether the fused block gives what the module gives, each of its layers unhooked and frozen."""
    drawn = torch.Generator().manual_seed(0)
    weight = gate.weight
    x = torch.randn(2, weight.shape[1], generator=drawn).to(weight.device, weight.dtype)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    was_training = fused.module.training
    fused.module.eval()
    try:
        with torch.no_grad():
            own, ours = type(fused.module).forward(fused.module, x), fused(x)
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        fused.module.train(was_training)
    return torch.allclose(own, ours, rtol=tolerance, atol=tolerance * float(own.abs().max()))


def _activation(module: nn.Module) -> Activation | None:
    """The activation that a block has, as a child or as a function."""
    x = torch.linspace(-4, 4, 33)
    candidates: list[Callable[..., Any]] = [
        value for value in (*module._modules.values(), *module.__dict__.values()) if callable(value)
    ]
    for candidate in candidates:
        if isinstance(candidate, nn.Module) and is_linear(candidate):
            continue
        try:
            own = candidate(x)
        except (TypeError, ValueError, RuntimeError):
            continue
        for name in _ACTIVATIONS:
            if isinstance(own, Tensor) and torch.allclose(own, activate(x, name), atol=1e-7):
                return name
    return None
