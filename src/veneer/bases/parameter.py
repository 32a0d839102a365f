"""One parameter of a module by itself: a matrix (O, I), or a matrix for each expert (E, O, I) or (E, I, O).

Shape legend: E experts, O outputs, I inputs, R rank. W is shown with the experts' rows below each other, (E O, I).
As in PEFT, A is (E R, I) with an expert's rows together, and B is (O, R E) with an expert's columns E apart. Which of
the two three-dimensional layouts it is, a module says itself, by ``is_transposed``.
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from veneer.core.base import WeightBase, merge_dtype
from veneer.core.parametrised import replace, value_of


@final
class Base(WeightBase):
    """A parameter that the module uses as it likes, named in ``target_parameters``; a parametrised one too."""

    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    zero_factor: ClassVar[Literal["A", "B"]] = "B"
    has_output_bias: ClassVar[bool] = False
    fan_in_fan_out: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    one_matrix: ClassVar[bool] = False

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        # Never a module's only meaning: a config names the parameter.
        return False

    def shape(self) -> tuple[int, int]:
        experts, out, inputs = self._sizes()
        return experts * out, inputs

    def placement(self) -> tuple[torch.device, torch.dtype]:
        W = self._value()
        return W.device, W.dtype

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts, out, inputs = self._sizes()
        return (experts * r, inputs), (out, r * experts)

    def weight(self) -> Tensor:
        W = self._value()
        return (W.transpose(1, 2) if self._is_transposed() else W).reshape(self.shape())

    def bias_name(self) -> str | None:
        return None

    def replace(self, W_OI: Tensor) -> None:
        replace(self.module, self.leaf, self.stored(W_OI))

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        experts, out, inputs = self._sizes()
        wide = merge_dtype(A, B)
        A_ERI = A.to(wide).view(experts, -1, inputs)
        B_EOR = B.to(wide).view(out, -1, experts).permute(2, 0, 1)
        return (B_EOR @ A_ERI).view(experts * out, inputs)

    def stored(self, W_OI: Tensor) -> Tensor:
        experts, out, inputs = self._sizes()
        if self._value().ndim == 2:
            return W_OI
        W_EOI = W_OI.view(experts, out, inputs)
        # Laid out as it was, so that a product with it is rounded as it was.
        return W_EOI.transpose(1, 2).contiguous() if self._is_transposed() else W_EOI

    def _value(self) -> Tensor:
        return value_of(self.module, self.leaf)

    def _is_transposed(self) -> bool:
        return self._value().ndim == 3 and bool(getattr(self.module, "is_transposed", False))

    def _sizes(self) -> tuple[int, int, int]:
        *experts, out, inputs = self._value().shape
        if self._is_transposed():
            out, inputs = inputs, out
        return experts[0] if experts else 1, out, inputs
