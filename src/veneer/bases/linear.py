"""``torch.nn.Linear``: the weight is stored (O, I).

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from veneer.core.base import LinearBase
from veneer.kernels.dropout import drop
from veneer.kernels.lora_linear import lora_linear, low_rank
from veneer.kernels.lora_quantised import runs_plain


@final
class Base(LinearBase):
    """A linear layer with a plain floating-point weight."""

    fan_in_fan_out: ClassVar[bool] = False
    exact: ClassVar[bool] = True

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
        if type(self.module).forward is not nn.Linear.forward or not runs_plain(self.module):
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
