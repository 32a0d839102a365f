"""AdaLoRA's config: PEFT's names, defaults and meaning. Apart from its variant, so that flags need no torch.

Zhang et al., arXiv 2303.10512.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, final

from veneer.core.config import LoraConfig, TunerConfig, positive, positive_int, probability, strict
from veneer.core.errors import ConfigError, nearest

E = "lora_E"
"""The name of the singular values."""
_OWN = frozenset({"lora_alpha", "lora_dropout", "init_lora_weights", "rank_pattern"})


def _of_lora() -> dict[str, Any]:
    """LoRA's fields, which PEFT's AdaLoRA files hold too, with the values that mean nothing."""
    default = LoraConfig().to_dict()
    own = {f.name for f in fields(TunerConfig)} | _OWN
    return {name: value for name, value in default.items() if name not in own}


@final
@strict
@dataclass(kw_only=True)
class AdaLoraConfig(TunerConfig):
    """Low-rank adaptation with a budget of ranks that moves to where it helps most (Zhang et al., arXiv 2303.10512).

    Fields, names, defaults and meaning are PEFT's. All layers start with rank ``init_r``; from step ``tinit`` on the
    budget shrinks, until from step ``total_step - tfinal`` on there are ``target_r`` ranks a layer left on average.

    >>> config = AdaLoraConfig(init_r=12, target_r=4, tinit=50, tfinal=100, deltaT=10, total_step=500)

    Raises:
        ConfigError: an unknown field (the nearest is named), a schedule without a middle, or a bad value.
    """

    not_built: ClassVar[Mapping[str, Any]] = _of_lora()
    not_asked: ClassVar[frozenset[str]] = frozenset({"r", "total_step", "rank_pattern"})

    peft_type: str | None = "ADALORA"
    """The variant family in PEFT's spelling."""
    r: int = 8
    """Not used; kept for PEFT's file. The ranks are init_r and target_r."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained: none, all, or those of the adapted layers."""
    target_r: int = 8
    """The average rank of a layer at the end."""
    init_r: int = 12
    """The rank of every layer at the start."""
    tinit: int = 0
    """Steps before the budget begins to shrink."""
    tfinal: int = 0
    """Steps at the end with the final budget."""
    deltaT: int = 1  # noqa: N815 - PEFT's name
    """Steps between two allocations of the budget."""
    beta1: float = 0.85
    """How slowly the sensitivity of an entry is averaged over steps."""
    beta2: float = 0.85
    """How slowly the uncertainty of that sensitivity is averaged over steps."""
    orth_reg_weight: float = 0.5
    """The weight of the penalty that keeps P and Q orthogonal."""
    total_step: int | None = None
    """Optimiser steps of the whole training; must be given (a run of veneer's own fills it in)."""
    lora_alpha: int | float = 8
    """The update is scaled by lora_alpha / init_r."""
    lora_dropout: float = 0.0
    """The probability of dropping an input of the update during training."""
    init_lora_weights: bool = True
    """Start as the base model (true), or with everything random (false)."""
    rank_pattern: dict[str, list[bool]] | None = None
    """Which entries of each layer stayed, by the name of its lora_E; written by the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r not in (8, self.init_r):
            warnings.warn(
                f"AdaLoRA does not use r={self.r}; its ranks are init_r={self.init_r} and target_r.", stacklevel=4
            )
        for name in ("init_r", "target_r", "deltaT"):
            positive_int(name, getattr(self, name))
        for name in ("tinit", "tfinal"):
            _count(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            probability(name, getattr(self, name))
            positive(name, getattr(self, name))
        if self.orth_reg_weight != 0:
            positive("orth_reg_weight", self.orth_reg_weight)
        positive("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        # The keys of the two starts in inits/ that mean the same.
        self.init_lora_weights = {"kaiming": True, "random": False}.get(
            self.init_lora_weights,
            self.init_lora_weights,  # type: ignore[call-overload]
        )
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"init_lora_weights is {self.init_lora_weights!r}; expected true, or false for a random start."
            )
        if self.target_r > self.init_r:
            raise ConfigError(f"target_r is {self.target_r}, more than init_r={self.init_r}; AdaLoRA takes ranks away.")
        self._check_schedule()
        _check_pattern(self.rank_pattern)

    def _check_schedule(self) -> None:
        if self.total_step is None:
            raise ConfigError("total_step is not given; AdaLoRA must know how many optimiser steps the training has.")
        positive_int("total_step", self.total_step)
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of the total_step={self.total_step} steps to "
                "move the budget in; make them smaller, or train longer."
            )

    @property
    def rank(self) -> int:
        return self.init_r

    @property
    def alpha(self) -> float:
        return self.lora_alpha

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def ranks(self) -> Mapping[str, int]:
        # A module's whole name, taken as it stands.
        return {re.escape(name.removesuffix(f".{E}")): sum(kept) for name, kept in (self.rank_pattern or {}).items()}

    @property
    def alphas(self) -> Mapping[str, float]:
        return {}

    @property
    def init(self) -> str:
        return "kaiming" if self.init_lora_weights else "random"


def _count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name} is {value!r}; expected a number of steps, from 0.")


def _check_pattern(pattern: Any) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, dict):
        raise ConfigError(
            f"rank_pattern is {pattern!r}; expected a mapping from lora_E names to lists of true and false."
        )
    for name, kept in pattern.items():
        if not isinstance(name, str) or not name.endswith(f".{E}"):
            raise ConfigError(f"rank_pattern has {name!r}; expected the name of a lora_E.{nearest(str(name), [E])}")
        if not isinstance(kept, list) or not all(isinstance(entry, bool) for entry in kept):
            raise ConfigError(f"rank_pattern[{name!r}] is {kept!r}; expected a list of true and false.")
