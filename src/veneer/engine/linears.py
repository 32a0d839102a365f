"""What a linear layer computes right now, for kernels that compute it together with others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.adapters.layer import AdaptedLayer
from veneer.kernels.dropout import repeatable
from veneer.kernels.lora_group import Member
from veneer.variants.lora import Variant as Lora

_FACTORS = ("lora_A.weight", "lora_B.weight")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, adapted or not."""
    inner = module.get_base_layer() if isinstance(module, AdaptedLayer) else module
    return type(inner) is nn.Linear and "forward" not in module.__dict__


def member_of(module: nn.Module, x: Tensor) -> Member | None:
    """A layer's frozen weight with the factors that are to be added, or None where it must be called by itself.

    That is so with more than one active adapter, with another variant than LoRA, merged or routed rows, hooks, dropout
    whose mask cannot be drawn again, weights that learn, frozen weights of another dtype than the input, and under an
    autocast to another.
    """
    if _is_cast(x) or torch.compiler.is_compiling() or _hooked(module):
        return None
    if not isinstance(module, AdaptedLayer):
        return _frozen(module, x)
    base = module.base_layer
    if not module.router.idle or module.merged_adapters or isinstance(base, AdaptedLayer) or _hooked(base):
        return None
    plain = None if "forward" in base.__dict__ else _frozen(base, x)
    if plain is None or not module.live:
        return plain
    name = module.live[0]
    if len(module.live) > 1 or type(module.variants[name]) is not Lora or name in module.live_scaling:
        return None
    dropout = module.lora_dropout[name] if module.training else 0.0
    if dropout and not repeatable(x):
        return None
    given = module.given(name)
    if tuple(given) != _FACTORS:
        return None
    # Factors learn in float32 on a bfloat16 base, and are thin: they follow the input, as in lora_linear.
    A_RI, B_OR = (given[factor].to(x.dtype) for factor in _FACTORS)
    return Member(plain.W_OI, plain.bias, A_RI, B_OR, module.scaling[name], dropout)


def _is_cast(x: Tensor) -> bool:
    """Whether autocast would compute in another dtype than the input has."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype


def _frozen(module: nn.Module, x: Tensor) -> Member | None:
    W_OI, bias_O = module._parameters["weight"], module._parameters["bias"]
    if W_OI is None or W_OI.requires_grad or W_OI.dtype != x.dtype:
        return None
    if bias_O is not None and (bias_O.requires_grad or bias_O.dtype != x.dtype):
        return None
    return Member(W_OI, bias_O)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
