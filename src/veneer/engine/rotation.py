"""Rotary embedding on the kernel that keeps nothing of queries and keys, for attention layers that turn halves."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.kernels.rotary import rotary

FUNCTION = "apply_rotary_pos_emb"
"""transformers' name for it in every modeling file that has rotary embedding."""


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' ``apply_rotary_pos_emb`` on the kernel."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return rotary(q, cos, sin), rotary(k, cos, sin)


def fused_rotation(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of an attention layer with the kernel in the place of its own function; None where it has none.

    The forward is the very same code, with one name bound to something else: only for this layer, and only when
    both functions give the same on random numbers.
    """
    forward = type(module).forward
    names = getattr(forward, "__globals__", {})
    own = names.get(FUNCTION)
    if FUNCTION not in forward.__code__.co_names or "forward" in module.__dict__ or not _same(own):
        return None

    def either(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Some turn only a part of a head.
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1]
        found: tuple[Tensor, Tensor] = (turned if whole else own)(q, k, cos, sin, *args, **kwargs)
        return found

    copied = types.FunctionType(
        forward.__code__, {**names, FUNCTION: either}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(copied, module)


def _same(own: Any) -> bool:
    drawn = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=drawn) for heads in (2, 1))
    cos, sin = (torch.randn(1, 3, 8, generator=drawn) for _ in range(2))
    try:
        pairs = zip(own(q, k, cos, sin), turned(q, k, cos, sin), strict=True)
        return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
