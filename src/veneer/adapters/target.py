"""One place to adapt, with everything that a config says about it, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from veneer.adapters.index import ModuleIndex, Slot, view
from veneer.adapters.rebase import frozen_specs, initial_specs
from veneer.core import registry
from veneer.core.base import AbstractBase, WeightBase
from veneer.core.config import LoraConfig, TunerConfig
from veneer.core.errors import ConfigError
from veneer.core.init import AbstractInit
from veneer.core.variant import AbstractVariant, ParameterSpec

OUT_TIMES = 2
"""PEFT adds the update of an attention's output projection twice, in the forward pass and merged alike: its files are
trained for that."""


@dataclass(frozen=True)
class Target:
    """One module or parameter to adapt."""

    slot: Slot
    kind: str
    r: int
    lora_alpha: float
    scaling: float
    specs: dict[str, ParameterSpec]
    tied_to: str | None = None
    """The path of the embeddings whose factors it uses, and which then has no tensors of its own."""

    def on_disk(self) -> dict[str, ParameterSpec]:
        """The tensors of this module that are in the adapter's file."""
        return {key: spec for key, spec in self.specs.items() if spec.saved}


def make_targets(
    index: ModuleIndex, slot: Slot, r: int, alpha: float, variant: AbstractVariant, config: TunerConfig
) -> list[Target]:
    """What a config means on one slot, and on what is adapted with it: an attention's output projection, as in PEFT.

    Raises:
        ConfigError: the variant, the start or the dropout has no meaning there.
    """
    target = _make(slot, r, alpha, variant, config)
    if slot.kind != "attention":
        return [target]
    out = replace(index.slots[f"{slot.path}.out_proj"], kind="linear", read=True)
    return [target, _make(out, r, alpha, variant, config, times=OUT_TIMES)]


def _make(slot: Slot, r: int, alpha: float, variant: AbstractVariant, config: TunerConfig, times: int = 1) -> Target:
    """One target, whose update counts this many times."""
    assert slot.kind is not None
    base, init = view(slot), registry.load("inits", config.init).Init
    if config.dropout and isinstance(base, WeightBase):
        raise ConfigError(
            f"lora_dropout is {config.dropout}, but {slot.path!r}, a {type(slot.module).__name__}, has no "
            "input of its own to drop; set lora_dropout to 0 or take it out of the targets."
        )
    if variant.options or type(config) is not LoraConfig or _needs_weight(init):
        _check_update(base, slot, r)
    specs = variant.parameters(base, r, config)
    if init.frozen is not None:
        specs |= frozen_specs(base, specs, init.frozen)
    if init.subtracts:
        specs |= initial_specs(base, specs)
    return Target(slot, slot.kind, r, alpha, times * variant.scaling(r, alpha, config), specs)


def _needs_weight(init: type[AbstractInit]) -> bool:
    return init.subtracts or init.moves or init.evidence is not None


def _check_update(base: AbstractBase, slot: Slot, r: int) -> None:
    """Refuse what computes with the updated weight where that is not W with one product B A added."""
    A, B = base.factor_shapes(r)
    if (B[0], math.prod(A[1:])) != base.shape():
        raise ConfigError(
            f"{slot.path!r}, a {type(slot.module).__name__}, can be adapted by plain LoRA with a plain start only: its "
            "factors are laid out for each expert or for other groups than its weight's, not as one product B A."
        )
