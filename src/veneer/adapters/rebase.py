"""Adapters that stand on another weight than W, because of how they started.

A start such as PiSSA puts a part of W into the factors, ``A0`` and ``B0``, and lets the adapter stand on
``W - B0 A0``. W itself is never written to: the two frozen factors are kept beside the trained ones and taken off
in the forward pass. So disabling, switching and deleting give the base back bit for bit, several such adapters live
on one model, and none of it needs a second copy of W.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from veneer.core import registry
from veneer.core.base import AbstractBase, InputBase, QuantisedBase, merge_dtype, plain_linear
from veneer.core.config import TunerConfig
from veneer.core.errors import AdapterFileError
from veneer.core.init import AbstractInit
from veneer.core.parametrised import shell
from veneer.core.variant import ParameterSpec

if TYPE_CHECKING:
    from veneer.adapters.target import Target

_INITIAL = "initial_"

STANDING = "initial_weight"
"""The key of a whole weight that an adapter stands on."""


def initial_tensors(base: AbstractBase, p: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The frozen copies of the factors as they are now; the scaling goes into that of B."""
    A, B = base.factor_names
    return {initial_name(A): p[A].clone(), initial_name(B): p[B] * scaling}


def initial_name(factor_name: str) -> str:
    """The key of the frozen copy of a starting factor: "lora_A.weight" becomes "initial_A.weight"."""
    return factor_name.replace("lora_", _INITIAL, 1)


def initial_specs(base: AbstractBase, specs: Mapping[str, ParameterSpec]) -> dict[str, ParameterSpec]:
    """The frozen copies that a start which takes a part of W needs beside a variant's own tensors."""
    return {initial_name(name): ParameterSpec(specs[name].shape, trainable=False) for name in base.factor_names}


def frozen_specs(
    base: AbstractBase, specs: Mapping[str, ParameterSpec], factor: Literal["A", "B"]
) -> dict[str, ParameterSpec]:
    """The factor that stays as it starts, as a tensor that does not learn."""
    name = base.factor_names["AB".index(factor)]
    return {name: replace(specs[name], trainable=False)}


def made_again(source: str, tensors: Iterable[str], config: TunerConfig, targets: Sequence[Target]) -> set[str]:
    """Which frozen factors of a start a file leaves out, as PEFT's files do: PEFT computes them from W at every load.

    Args:
        source: the file, for the message.
        tensors: the keys of its tensors.
        config: the adapter's config.
        targets: its layers.

    Raises:
        AdapterFileError: they are not in the file, and cannot be known without it.
    """
    init: type[AbstractInit] = registry.load("inits", config.init).Init
    wanted = {name for target in targets for name in target.on_disk() if name.startswith(_INITIAL)}
    if not wanted or any(key.endswith(tuple(f".{name}" for name in wanted)) for key in tensors):
        return set()
    if init.repeatable or (init.evidence and all(target.slot.evidence() is not None for target in targets)):
        return wanted
    if init.evidence:
        origin, way = "data", "gather its data again on this model first"
    else:
        origin = "a random draw, which PEFT repeats with another result at every load"
        way = "pass a config with init_lora_weights='pissa' to take W's exact components in their place"
    raise AdapterFileError(
        f"{source} does not hold the factors that it started from, and they came from {origin}; save it as plain LoRA "
        f"where it was trained (path_initial_model_for_weight_conversion), or {way}."
    )


def standing(base: AbstractBase, p: Mapping[str, Tensor]) -> AbstractBase:
    """The base as an adapter with these tensors sees it: on another weight when its start says so."""
    if STANDING in p:
        return with_weight(base, p[STANDING].reshape(base.shape()))
    A0, B0 = (p.get(initial_name(name)) for name in base.factor_names)
    if A0 is None or B0 is None or not isinstance(base, InputBase):
        return base
    taken = _Less(base.module, base.leaf)
    own = ("factor_names", "zero_factor", "has_output_bias", "fan_in_fan_out", "exact")
    taken.__dict__.update({name: getattr(base, name) for name in own}, inner=base, A0=A0, B0=B0)
    return taken


def standing_weight(base: AbstractBase, p: Mapping[str, Tensor]) -> Tensor | None:
    """The (O, I) weight that an adapter with these tensors stands on; None when that is W itself."""
    if STANDING in p:
        return p[STANDING]
    A0, B0 = (p.get(initial_name(name)) for name in base.factor_names)
    if A0 is None or B0 is None:
        return None
    W = base.weight()
    return W.to(merge_dtype(W, A0)) - base.delta(A0, B0)


def with_weight(base: AbstractBase, W_OI: Tensor) -> AbstractBase:
    """The base over a stand-in for its module that has another weight; the module itself is not touched."""
    if isinstance(base, QuantisedBase):
        # Quantised again, it would not be the weight that the adapter stands on.
        plain: AbstractBase = registry.load("bases", "linear").Base(plain_linear(W_OI, base.bias()))
        return plain
    other = type(base)(shell(base.module), base.leaf)
    other.replace(W_OI)
    return other


@final
class _Less(InputBase):
    """A base whose weight is ``W - B0 A0``; what its class says of itself is replaced by what the inner base says."""

    factor_names: ClassVar[tuple[str, str]] = ("", "")
    zero_factor: ClassVar[Literal["A", "B"]] = "B"
    has_output_bias: ClassVar[bool] = True
    fan_in_fan_out: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    inner: InputBase
    A0: Tensor
    B0: Tensor

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return False

    def shape(self) -> tuple[int, int]:
        return self.inner.shape()

    def placement(self) -> tuple[torch.device, torch.dtype]:
        return self.inner.placement()

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.inner.factor_shapes(r)

    def weight(self) -> Tensor:
        W = self.inner.weight()
        return W.to(merge_dtype(W, self.A0)) - self.inner.delta(self.A0, self.B0)

    def bias_name(self) -> str | None:
        return self.inner.bias_name()

    def replace(self, W_OI: Tensor) -> None:
        self.inner.replace(W_OI)

    def frozen(self, x: Tensor) -> Tensor:
        return self.inner.adapted(x, self.A0, -self.B0, 1.0, bias=None, dropout=0.0)

    def adapted(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        if not dropout and A.ndim == B.ndim == 2:
            # Both pairs of factors as one, so that the base can fuse them.
            A, B = torch.cat([A, self.A0.to(A.dtype)]), torch.cat([B, self.B0.to(B.dtype) / -scaling], 1)
            return self.inner.adapted(x, A, B, scaling, bias=bias, dropout=0.0)
        y = self.frozen(x)
        return y + self.inner.low_rank(x, A, B, scaling, bias=bias, dropout=dropout).to(y.dtype)

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float, *, bias: Tensor | None, dropout: float
    ) -> Tensor:
        return self.inner.low_rank(x, A, B, scaling, bias=bias, dropout=dropout)

    def drop(self, x: Tensor, dropout: float) -> Tensor:
        return self.inner.drop(x, dropout)

    def rows(self, y: Tensor, value_O: Tensor) -> Tensor:
        return self.inner.rows(y, value_O)

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        return self.inner.delta(A, B)
