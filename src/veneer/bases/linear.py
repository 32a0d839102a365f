"""``torch.nn.Linear``: the weight is stored (O, I).

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from veneer.core.base import InputBase, product
from veneer.kernels.dropout import drop
from veneer.kernels.lora_linear import lora_linear, low_rank


@final
class Base(InputBase):
    """A linear layer with a plain floating-point weight."""

    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    zero_factor: ClassVar[Literal["A", "B"]] = "B"
    has_output_bias: ClassVar[bool] = True
    fan_in_fan_out: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    linear_layer: ClassVar[bool] = True

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Linear)
            and type(module._parameters.get("weight")) is nn.Parameter
            and module.weight.is_floating_point()
        )

    def shape(self) -> tuple[int, int]:
        W_OI = self.module.weight
        return W_OI.shape[0], W_OI.shape[1]

    def placement(self) -> tuple[torch.device, torch.dtype]:
        return self.module.weight.device, self.module.weight.dtype

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out, inputs = self.shape()
        return (r, inputs), (out, r)

    def weight(self) -> Tensor:
        return self.module.weight

    def bias_name(self) -> str | None:
        return "bias" if self.module.bias is not None else None

    def replace(self, W_OI: Tensor) -> None:
        self.module.weight = nn.Parameter(W_OI, requires_grad=False)

    def frozen(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def adapted(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        if not _runs_plain(self.module):
            return self.frozen(x) + self.low_rank(x, A, B, scaling, bias=bias, dropout=dropout)
        own = self.module.bias
        if bias is not None:
            own = bias * scaling if own is None else own + (bias * scaling).to(own.dtype)
        return lora_linear(x, self.module.weight, own, A, B, scaling, dropout)

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        return low_rank(x, A, B, scaling, bias_O=bias, dropout=dropout)

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        return drop(x, dropout)

    def rows(self, y: Tensor, value_O: Tensor) -> Tensor:
        return value_O

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        return product(A, B)


def _runs_plain(module: nn.Module) -> bool:
    """Whether calling the module is exactly ``F.linear``: no hook, no replaced forward that must run."""
    return (
        type(module).forward is nn.Linear.forward
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )
