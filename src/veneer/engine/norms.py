"""Root-mean-square norms on the kernel that keeps the least: found by what they compute."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.kernels.rms_norm import rms_norm

_OFFSETS = (0.0, 1.0)


@final
class FusedNorm:
    """The forward of one norm. A weight that learns goes the module's own way."""

    def __init__(self, module: nn.Module, eps: float, offset: float) -> None:
        self.module, self.eps, self.offset = module, eps, offset

    def __call__(self, x: Tensor) -> Tensor:
        w_D = self.module._parameters["weight"]
        assert w_D is not None
        if w_D.requires_grad or torch.compiler.is_compiling():
            out: Tensor = type(self.module).forward(self.module, x)
            return out
        return rms_norm(x, w_D, self.eps, self.offset)


def fused_norm(module: nn.Module) -> FusedNorm | None:
    """The fused forward of a module that is a root-mean-square norm; None for any other.

    It is one when it has a vector of weights, a small number called eps, and gives what the kernel gives on random
    numbers.
    """
    eps = next((v for key in ("variance_epsilon", "eps") if isinstance(v := getattr(module, key, None), float)), None)
    weight: Any = module._parameters.get("weight")
    if eps is None or weight is None or weight.ndim != 1 or len(module._parameters) != 1 or module._modules:
        return None
    if weight.is_meta or "forward" in module.__dict__:
        return None
    drawn = torch.Generator().manual_seed(0)
    x = (torch.randn(3, len(weight), generator=drawn) * 2).to(weight.device, weight.dtype)
    tolerance = 1e-6 if weight.dtype == torch.float32 else torch.finfo(weight.dtype).eps
    try:
        with torch.no_grad():
            own = type(module).forward(module, x)
            for offset in _OFFSETS:
                if torch.allclose(rms_norm(x, weight, eps, offset), own, rtol=tolerance, atol=tolerance):
                    return FusedNorm(module, eps, offset)
    except (TypeError, ValueError, RuntimeError):
        return None
    return None
