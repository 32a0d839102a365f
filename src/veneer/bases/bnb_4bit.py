"""bitsandbytes' ``Linear4bit``: W in NF4 or FP4, in blocks with a scale each, which may be quantised in turn.

QLoRA (Dettmers et al., arXiv 2305.14314) trains adapters on such a base.

On a CPU with bfloat16 instructions, a call in evaluation mode makes bitsandbytes rewrite the stored weight in a packed
form: the scales are rounded to bfloat16 for good, products no longer have a gradient, and rows that are not a
multiple of 32 fail. ``settle`` switches that off, and takes it back where it has happened.

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

_REWRITES = "support_avx512bf16_for_cpu"


@final
class Base(QuantisedBase):
    """A linear layer of 4 bits a weight, known by its name so that bitsandbytes need not be imported."""

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        # Its subclasses LinearNF4 and LinearFP4 included.
        return any(c.__name__ == "Linear4bit" and c.__module__.startswith("bitsandbytes.") for c in type(module).mro())

    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features  # type: ignore[return-value]

    def placement(self) -> tuple[torch.device, torch.dtype]:
        stored: Any = self.module.weight
        state = _state(self.module)
        return stored.device, stored.dtype if state is None else state.dtype

    def weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        stored: Any = self.module.weight
        state = _state(self.module)
        if state is None:
            # Not moved to a device yet, which is when it is quantised.
            return stored.detach()
        data = stored.data
        if _rewritten(state):
            data, state = _written_back(data, copy.copy(state))
        W_OI: Tensor = dequantize_4bit(data, state)
        return W_OI

    def bias_name(self) -> str | None:
        return "bias" if self.module.bias is not None else None

    def replace(self, W_OI: Tensor) -> None:
        from bitsandbytes.nn import Params4bit

        stored: Any = self.module.weight
        device, dtype = self.placement()
        state = _state(self.module)
        if state is None:
            self.module.weight = Params4bit(W_OI.to(dtype), **_format(stored), module=self.module)
            return
        fresh = Params4bit(
            W_OI.detach().to(dtype),
            **_format(stored),
            blocksize=state.blocksize,
            compress_statistics=getattr(state, "original_nested", state.nested),
            quant_type=state.quant_type,
        ).to(device)
        self.module._parameters["weight"] = fresh
        self.module.__dict__["quant_state"] = fresh.quant_state

    def settle(self) -> bool:
        self.module.__dict__[_REWRITES] = False
        stored: Any = self.module.weight
        state = _state(self.module)
        if state is None or not _rewritten(state):
            return False
        stored.data, stored.quant_state = _written_back(stored.data, state)
        return True

    def check_merge(self, into: Into) -> None:
        """Both can be done."""

    def stored(self) -> list[Tensor]:
        stored: Any = self.module.weight
        state = _state(self.module)
        found = [stored.data]
        if state is not None:
            found += [state.absmax, state.code]
            found += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        return found

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


def _state(module: nn.Module) -> Any:
    """How the stored weight is to be read; None before it is quantised. Sharded training loses the weight's own."""
    own = getattr(module.weight, "quant_state", None)
    return own if own is not None else module.__dict__.get("quant_state")


def _rewritten(state: Any) -> bool:
    return bool(state.__dict__.get("packing_format_for_cpu", False))


def _written_back(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    original, state = _convert_weight_packed_for_cpu_inverse(data, state)
    if not state.nested:
        # It turned the scales round, and leaves them so unless they were quantised.
        state.absmax = state.absmax.t().reshape(-1).float()
    return original, state


def _format(stored: Any) -> dict[str, Any]:
    return {"quant_storage": stored.quant_storage, "requires_grad": False}
