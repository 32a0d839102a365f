"""Where the frozen weight W lives: how to read it, replace it, and apply it with an update.

Shape legend: N tokens, I inputs, O outputs, R rank. Every base shows its weight as one (O, I) matrix.

There are two kinds. An ``InputBase`` is a module that multiplies its input by W, so that an update can be added
to its output and W is never built again. A ``WeightBase`` is a module that uses W inside a larger computation
(packed attention, experts): there the update is added to W itself for the length of the call.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from veneer.core.parametrised import shell

Into = Literal["dequantised", "requantised"]
"""What a quantised layer can become when an adapter is merged into it."""


class AbstractBase(ABC):
    """A view on one frozen weight of a module. It holds no tensors; make one whenever it is needed.

    A file ``bases/<kind>.py`` defines the final class ``Base`` below ``InputBase`` or ``WeightBase``; its file
    name is the kind that reports show.
    """

    factor_names: ClassVar[tuple[str, str]]
    """The names of A and B as they are stored, e.g. ``("lora_A.weight", "lora_B.weight")``."""
    zero_factor: ClassVar[Literal["A", "B"]]
    """The factor that starts at zero, so that a fresh adapter changes nothing."""
    has_output_bias: ClassVar[bool]
    """Whether the operation has a place for a bias (``lora_bias`` needs one)."""
    fan_in_fan_out: ClassVar[bool]
    """Whether the weight is stored (I, O) instead of (O, I)."""
    exact: ClassVar[bool]
    """Whether ``replace(weight())`` changes nothing: false where W is stored in fewer bits than it is read in."""
    linear_layer: ClassVar[bool] = False
    """Whether the module is a linear layer, one of those that ``target_modules="all-linear"`` means."""
    one_matrix: ClassVar[bool] = True
    """Whether a row of W is all that one output sees: false where W holds several matrices in one (experts)."""

    own_leaf: ClassVar[str] = "weight"
    """The name of W among the parameters of a module that this base accepts."""

    @final
    def __init__(self, module: nn.Module, leaf: str = "weight") -> None:
        self.module = module
        self.leaf = leaf
        """The name of W among the module's parameters."""

    @staticmethod
    @abstractmethod
    def accepts(module: nn.Module) -> bool:
        """Whether this base knows how to adapt ``module``. Must be cheap and import nothing."""

    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight matrix."""

    @abstractmethod
    def placement(self) -> tuple[torch.device, torch.dtype]:
        """The device of W and the floating-point dtype that it is read in: those of a new adapter. Cheap."""

    @abstractmethod
    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The stored shapes of A and B for rank ``r``.

        Raises:
            ConfigError: this module cannot have that rank.
        """

    @abstractmethod
    def weight(self) -> Tensor:
        """W as an (O, I) matrix: a view where the layout allows, never a surprise cast."""

    @abstractmethod
    def bias_name(self) -> str | None:
        """The name of the bias that belongs to W among the module's parameters; None where there is none."""

    @abstractmethod
    def replace(self, W_OI: Tensor) -> None:
        """Give the module a new weight parameter. The old one is left untouched, so tied modules keep theirs."""

    @abstractmethod
    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """B A as an (O, I) matrix in float32 (or float64 when a factor is)."""


class InputBase(AbstractBase):
    """A module that multiplies its first argument by W and may add a bias."""

    @abstractmethod
    def frozen(self, x: Tensor) -> Tensor:
        """The module's own output."""

    @abstractmethod
    def adapted(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        """``frozen(x) + scaling * (B A drop(x) + bias)``, fused where the base can."""

    @abstractmethod
    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        """``scaling * (B A drop(x) + bias)`` alone, in the dtype of the output."""

    @abstractmethod
    def drop(self, x: Tensor, dropout: float) -> Tensor:
        """The input after dropout, for a variant that multiplies it by more than A.

        Raises:
            ConfigError: the input of this module has nothing to drop (token ids).
        """

    @abstractmethod
    def rows(self, y: Tensor, value_O: Tensor) -> Tensor:
        """A vector over the outputs, shaped so that it broadcasts against an output ``y``."""


class LinearBase(InputBase):
    """A linear layer: its factors are one pair of matrices, and its outputs are the last dimension. Abstract."""

    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    zero_factor: ClassVar[Literal["A", "B"]] = "B"
    has_output_bias: ClassVar[bool] = True
    linear_layer: ClassVar[bool] = True

    @final
    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out, inputs = self.shape()
        return (r, inputs), (out, r)

    @final
    def rows(self, y: Tensor, value_O: Tensor) -> Tensor:
        return value_O

    @final
    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        return product(A, B)


class QuantisedBase(LinearBase):
    """A linear layer whose W is stored in fewer bits than it is read in, so that merging into it rounds the update.

    ``replace`` quantises the weight again, in the same way.
    """

    fan_in_fan_out: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    @abstractmethod
    def settle(self) -> bool:
        """Keep the module from changing its stored weight when it is called.

        Returns:
            Whether it had changed it already.
        """

    @abstractmethod
    def check_merge(self, into: Into) -> None:
        """Whether W can be read, and for "requantised" replaced.

        Raises:
            MergeError: it cannot.
        """

    @abstractmethod
    def stored(self) -> list[Tensor]:
        """All tensors that W is stored in, its scales and tables included."""

    @abstractmethod
    def bias(self) -> Tensor | None:
        """The bias that the module adds, wherever it keeps it."""


class WeightBase(AbstractBase):
    """A module that uses W inside a larger computation."""

    @abstractmethod
    def stored(self, W_OI: Tensor) -> Tensor:
        """A weight in the layout of the module's parameter, differentiable in ``W_OI``."""


def call_with(module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """A module's output with other tensors in the place of some of its own parameters, also parametrised ones.

    It runs on a stand-in, so that nothing has to be put back and several threads may call it. A module whose
    ``forward`` was replaced on the instance (accelerate's hooks) is bound to itself: that one is changed for the
    length of the call.

    >>> call_with(nn.Linear(2, 3), {"weight": torch.zeros(3, 2)}, x)
    """
    bound = "forward" in module.__dict__
    seat = module if bound else shell(module)
    kind, before = seat.__class__, dict(seat._parameters)
    try:
        for name, tensor in tensors.items():
            if name in before:
                seat._parameters[name] = tensor  # type: ignore[assignment]
            else:
                # Parametrised: the class has a property of that name, which would win.
                seat.__class__ = _reading(seat.__class__, name)  # type: ignore[arg-type]
                seat.__dict__[f"_seated_{name}"] = tensor
        return seat(*args, **kwargs)
    finally:
        if bound:
            module.__class__ = kind
            module._parameters.update(before)
            for name in tensors:
                module.__dict__.pop(f"_seated_{name}", None)


@functools.cache
def _reading(kind: type[nn.Module], name: str) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {name: property(lambda module: module.__dict__[f"_seated_{name}"])})


def merge_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute a merged weight in: never below float32, so that it is rounded once."""
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def plain_linear(W_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """A linear layer of these two, frozen, made without a start of its own."""
    out, inputs = W_OI.shape
    layer = nn.Linear(inputs, out, bias=False, device="meta")
    layer.weight = nn.Parameter(W_OI, requires_grad=False)
    if bias_O is not None:
        layer.bias = as_parameter(bias_O)
    return layer


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor itself where it is a parameter, else a frozen parameter of it."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def product(A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """B A as an (O, I) matrix, in float32 or wider."""
    wide = merge_dtype(A_RI, B_OR)
    return B_OR.to(wide) @ A_RI.to(wide)
