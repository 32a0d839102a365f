"""One update for all modules that share the table of the input embeddings: ``ensure_weight_tying``.

A head that shares the embeddings' weight gets their factors, transposed, and no tensors of its own: what is learnt in
one place counts in the other, and merging gives both one weight again. A table that is trained whole is one copy. In
files each has its tensors, as PEFT's have.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from veneer.adapters.index import ModuleIndex, Slot
from veneer.core import registry
from veneer.core.config import LoraConfig, TunerConfig
from veneer.core.errors import ConfigError, listed
from veneer.core.variant import AbstractVariant

if TYPE_CHECKING:
    from veneer.adapters.adapted import AdaptedModel
    from veneer.adapters.layer import AdaptedLayer
    from veneer.adapters.names import Names
    from veneer.adapters.target import Target
    from veneer.adapters.targets import Selection


@final
class TiedFactors:
    """The factors of the embeddings as a head computes with them."""

    def __init__(self, source: AdaptedLayer) -> None:
        self.source = source

    def now(self, name: str) -> dict[str, Tensor]:
        """An adapter's factors, keyed as a linear layer's: A is what B is to the embeddings, and the other way."""
        A, B = self.source.base.factor_names
        p = self.source.given(name)
        return {mine: p[theirs].t() for mine, theirs in pairs(A, B)}


def pairs(A: str, B: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """(a head's factor, the embeddings' factor that it is the transpose of)."""
    head_A, head_B = registry.load("bases", "linear").Base.factor_names
    return (head_A, B), (head_B, A)


def tied_group(index: ModuleIndex) -> tuple[str, ...]:
    """The input embeddings and all modules that share their weight; nothing where none does."""
    source = index.input_path
    others = index.tied.get(source, ()) if source is not None else ()
    return (source, *others) if source is not None and others else ()


def tie_whole(index: ModuleIndex, config: TunerConfig, saved: list[Slot]) -> tuple[list[Slot], tuple[str, ...]]:
    """The modules to train whole with all that share their table, and the paths of those that are one copy."""
    group = tied_group(index) if _ensures(config) else ()
    if not any(slot.path in group for slot in saved):
        return saved, ()
    return [slot for slot in saved if slot.path not in group] + [index.slots[path] for path in group], group


def tie_targets(index: ModuleIndex, config: TunerConfig, slots: list[Slot]) -> list[Slot]:
    """The slots to adapt with the embeddings in the place of any head that shares their table.

    Raises:
        ConfigError: a module that shares the table cannot share the factors.
    """
    group = tied_group(index) if _ensures(config) else ()
    if not any(slot.path in group for slot in slots):
        return slots
    source, *heads = (index.slots[path] for path in group)
    odd = [slot for slot in heads if slot.kind != "linear"]
    if source.kind != "embedding" or odd:
        raise ConfigError(
            f"ensure_weight_tying=True, but {listed(slot.path for slot in odd or [source])} shares the table of "
            f"{source.path!r} as a {type((odd or [source])[0].module).__name__}; factors can be shared between an "
            "Embedding and Linear heads only. Leave those modules out of target_modules, or the option at False."
        )
    own = [slot for slot in slots if slot.path not in group]
    return sorted([*own, source], key=lambda slot: (index.order[slot.owner], slot.order))


def tied_heads(
    index: ModuleIndex, config: TunerConfig, variant: AbstractVariant, targets: Sequence[Target]
) -> list[Target]:
    """A target for every head that takes the factors of the embeddings among these targets.

    Raises:
        ConfigError: the variant or the start means something else transposed.
    """
    group = tied_group(index) if _ensures(config) else ()
    source = next((target for target in targets if group and target.slot.path == group[0]), None)
    if source is None:
        return []
    init = registry.load("inits", config.init).Init
    if variant.options or type(config) is not LoraConfig or init.subtracts or init.moves or init.evidence:
        raise ConfigError(
            "ensure_weight_tying=True shares the factors of embeddings with the head by transposing them, which gives "
            "the same update for plain LoRA with a plain start only; set use_dora and the like to False and "
            "init_lora_weights to true, or leave the embeddings out of target_modules."
        )
    heads = [index.slots[path] for path in group[1:]]
    return [replace(source, slot=slot, kind="linear", specs={}, tied_to=source.slot.path) for slot in heads]


def warn_untied(index: ModuleIndex, config: TunerConfig, paths: Sequence[str]) -> None:
    """Say when ``ensure_weight_tying`` finds nothing to tie."""
    group = tied_group(index)
    if _ensures(config) and not set(group).intersection(paths):
        reason = "the adapter changes none of them" if group else "no module shares the weight of the input embeddings"
        warnings.warn(
            f"ensure_weight_tying=True has no effect: {reason}{f' ({listed(group)})' if group else ''}.", stacklevel=6
        )


def keeps_tied(adapted: AdaptedModel, name: str, path: str) -> bool:
    """Whether an adapter changes a module and all that share its weight as one."""
    return _ensures(adapted.peft_config[name]) and path in tied_group(adapted.index)


def tie_merged(adapted: AdaptedModel) -> None:
    """Give heads into which the same was merged as into the embeddings the very same weight again."""
    for layer in adapted.layers.values():
        every: Any = layer.shared.values()
        sources = {id(held.source): held.source for held in every if isinstance(held, TiedFactors)}
        for source in sources.values():
            merged = layer.merged_adapters
            if (
                merged
                and merged == source.merged_adapters
                and all(isinstance(layer.shared.get(name), TiedFactors) for name in merged)
            ):
                layer.get_base_layer()._parameters["weight"] = source.get_base_layer()._parameters["weight"]


def heads_in_file(adapted: AdaptedModel, name: str, names: Names) -> dict[str, str]:
    """From the key of a tied head's tensor in an adapter's file to that of the embeddings' one it transposes."""
    paths = {id(layer): path for path, layer in adapted.layers.items()}
    found = {}
    for path, layer in adapted.layers_of(name).items():
        held: Any = layer.shared.get(name)
        if isinstance(held, TiedFactors):
            source = names.wrapper(paths[id(held.source)])
            for mine, theirs in pairs(*held.source.base.factor_names):
                found[f"{names.wrapper(path)}.{mine}"] = f"{source}.{theirs}"
    return found


def tied_in_file(names: Mapping[str, str], selection: Selection, left: dict[str, Tensor], prefix: str) -> list[str]:
    """Take the tensors of tied modules out of a file, which must be those of the embeddings.

    Args:
        names: from a target's path to its name in the file.
        selection: what the adapter is on.
        left: the tensors of the file.
        prefix: of every key of the file.

    Returns:
        What is wrong with them.
    """
    by_path = {target.slot.path: target for target in selection.targets}
    problems = []
    for target in selection.targets:
        if target.tied_to is None:
            continue
        A, B = registry.load("bases", by_path[target.tied_to].kind).Base.factor_names
        for mine, theirs in pairs(A, B):
            tensor, source = left.pop(f"{names[target.slot.path]}.{mine}", None), f"{names[target.tied_to]}.{theirs}"
            if tensor is None:
                problems.append(
                    f"{names[target.slot.path]}.{mine} is missing, though ensure_weight_tying is on; turn it off in "
                    "the config when the head was trained without (in PEFT a regular expression can hide a tie)"
                )
            elif source in left and not left[source].equal(tensor.t()):
                problems.append(
                    f"{names[target.slot.path]}.{mine} is not the transpose of {source}, though ensure_weight_tying "
                    "is on"
                )
    for path in selection.together[1:]:
        first, other = (left.get(f"{prefix}{each}.weight") for each in (selection.together[0], path))
        if first is not None and other is not None and not first.equal(other):
            problems.append(
                f"{prefix}{path}.weight is not {prefix}{selection.together[0]}.weight, though ensure_weight_tying is on"
            )
    return problems


def _ensures(config: object) -> bool:
    return isinstance(config, LoraConfig) and config.ensure_weight_tying
