"""What holds a tensor of a module: a parameter, or a list of torch's parametrisations that it is computed by.

Merging puts another holder in its place and keeps the first one aside, so that it comes back as the very object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn
from torch.nn.utils import parametrize

Holder = nn.Parameter | nn.Module
"""A parameter, or what stands in ``module.parametrizations`` under the tensor's name."""


@final
class Fixed(nn.Module):
    """A parametrised tensor that is what it is: no longer computed from others."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.original = nn.Parameter(value, requires_grad=False)

    def forward(self) -> Tensor:
        return self.original


def holder_of(module: nn.Module, leaf: str) -> Holder | None:
    """What holds a tensor; None where the module has none of that name, or an empty one such as a missing bias."""
    if parametrize.is_parametrized(module, leaf):
        return module.parametrizations[leaf]  # type: ignore[index,return-value]
    return module._parameters.get(leaf)


def hold(module: nn.Module, leaf: str, holder: Holder | None) -> None:
    """Put a holder in the place of the one there, which stays what it is."""
    if isinstance(holder, nn.Module):
        lists: Any = module.parametrizations
        lists._modules[leaf] = holder
    else:
        module._parameters[leaf] = holder


def value_of(module: nn.Module, leaf: str) -> Tensor:
    """A tensor, computed afresh where it is parametrised: torch's cache knows one value for a module and its twins."""
    held = holder_of(module, leaf)
    value: Tensor = held() if isinstance(held, nn.Module) else getattr(module, leaf)
    return value


def replace(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Give a tensor another value, in a new holder of the same kind."""
    if parametrize.is_parametrized(module, leaf):
        hold(module, leaf, Fixed(value))
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def move(holder: Holder, like: Holder) -> None:
    """Move and cast a holder that was out of sight of its module's ``to`` to where another one is."""
    wanted = next(like.parameters()) if isinstance(like, nn.Module) else like
    if isinstance(holder, nn.Module):
        holder.to(wanted.device, wanted.dtype)
    elif (holder.device, holder.dtype) != (wanted.device, wanted.dtype):
        holder.data = holder.data.to(wanted.device, wanted.dtype)


def settle(module: nn.Module, leaf: str) -> None:
    """Make a plain parameter of a fixed tensor. torch's own function would change the classes of copies too."""
    held = holder_of(module, leaf)
    if not isinstance(held, Fixed):
        return
    kind, lists = type(module), module._modules["parametrizations"]
    assert lists is not None
    del lists._modules[leaf]
    if lists._modules:
        own = {key: value for key, value in vars(kind).items() if key not in (leaf, "__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, own)
    else:
        del module._modules["parametrizations"]
        module.__class__ = kind.__bases__[0]
    module._parameters[leaf] = held.original


def shell(module: nn.Module, others: Mapping[str, Holder | None] | None = None) -> nn.Module:
    """A module that shares everything with another one but for these holders, until one of it is replaced."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = dict(module._parameters)
    if parametrize.is_parametrized(module):
        lists, own = nn.ModuleDict(), module._modules["parametrizations"]
        assert isinstance(own, nn.ModuleDict)
        lists.update(dict(own.items()))
        twin.__dict__["_modules"] = {**module._modules, "parametrizations": lists}
    for leaf, holder in (others or {}).items():
        hold(twin, leaf, holder)
    return twin
