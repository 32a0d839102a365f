"""bitsandbytes' ``Linear8bitLt``: W in int8 with one scale a row.

LLM.int8() (Dettmers et al., arXiv 2208.07339). In evaluation mode the inputs are rounded to int8 too; when training on
a CPU they are not, so the two modes differ by more than dropout.

Shape legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.core.base import Into, QuantisedBase
from veneer.kernels.dropout import drop
from veneer.kernels.lora_linear import low_rank
from veneer.kernels.lora_quantised import quantised_adapted


@final
class Base(QuantisedBase):
    """A linear layer of 8 bits a weight, known by its name so that bitsandbytes need not be imported."""

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return (
            type(module).__name__ == "Linear8bitLt"
            and type(module).__module__.startswith("bitsandbytes.")
            # A layer that keeps its weight in 16 bits and rounds it at every call is for training the weight itself.
            and not module.state.has_fp16_weights  # type: ignore[union-attr]
        )

    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features  # type: ignore[return-value]

    def placement(self) -> tuple[torch.device, torch.dtype]:
        stored: Any = self.module.weight
        return stored.device, stored.dtype if stored.is_floating_point() else torch.float32

    def weight(self) -> Tensor:
        stored: Any = self.module.weight
        if stored.is_floating_point():
            # Not moved to a device yet, which is when it is quantised.
            return stored.detach()
        W_OI: Tensor = stored.data * (_scales(self.module).to(stored.device) / 127.0).unsqueeze(1)
        return W_OI

    def bias_name(self) -> str | None:
        return "bias" if self.module.bias is not None else None

    def replace(self, W_OI: Tensor) -> None:
        from bitsandbytes.nn import Int8Params

        device, _ = self.placement()
        quantised = not self.module.weight.is_floating_point()  # type: ignore[operator]
        fresh = Int8Params(W_OI.detach(), requires_grad=False, has_fp16_weights=False)
        # It is moving to a device that quantises.
        self.module._parameters["weight"] = fresh.to(device) if quantised else fresh
        state = copy.copy(self.module.state)
        state.reset_grads()  # type: ignore[union-attr]
        self.module.__dict__["state"] = state

    def settle(self) -> bool:
        return False

    def check_merge(self, into: Into) -> None:
        """Both can be done."""

    def stored(self) -> list[Tensor]:
        stored: Any = self.module.weight
        return [stored.data] if stored.is_floating_point() else [stored.data, _scales(self.module)]

    def bias(self) -> Tensor | None:
        own: Any = self.module.bias
        return own  # type: ignore[no-any-return]

    def frozen(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def adapted(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        return quantised_adapted(self, x, A, B, scaling, bias_O=bias, dropout=dropout)

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        return low_rank(x, A, B, scaling, bias_O=bias, dropout=dropout)

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        return drop(x, dropout)


def _scales(module: nn.Module) -> Tensor:
    """The largest absolute value of each row: with the weight until the first call, with the state after it."""
    stored: Any = module.weight
    state: Any = module.state
    found: Tensor = state.SCB if state.SCB is not None else stored.SCB
    return found
