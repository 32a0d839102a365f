"""Plain LoRA: two factors a layer whose product is the update itself, and the config that says so.

What is combined, extracted, resized or converted is written in this one form: alpha equals the rank on every layer,
so that ``alpha / r`` is 1. A reader that overlooks rank_pattern or alpha_pattern then still scales every layer right.

Shape legend: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from veneer.adapters.index import ModuleIndex
from veneer.adapters.rebase import STANDING, initial_name
from veneer.core import registry
from veneer.core.base import AbstractBase
from veneer.core.config import LoraConfig, PeftConfig, TunerConfig
from veneer.core.errors import UsageError
from veneer.core.lora_variant import BIAS
from veneer.core.variant import AbstractVariant

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Factors:
    """An update that is exactly ``scaling * (B A)``."""

    A: Tensor
    """(R, I)."""
    B: Tensor
    """(O, R)."""
    scaling: float
    """Its factor."""
    started: bool
    """Whether a frozen start was taken off: A and B are then stacks of two pairs, no factors that learned."""


def factors_of(
    variant: AbstractVariant, base: AbstractBase, tensors: Mapping[str, Tensor], *, scaling: float, r: int
) -> Factors | None:
    """The factors of an adapter on one layer; None when its update is no product of two thin matrices.

    Args:
        variant: what the update is.
        base: the layer.
        tensors: the adapter's tensors there, keyed as on disk.
        scaling: its factor.
        r: its rank.
    """
    if not is_product(variant) or STANDING in tensors:
        return None
    A, B = (tensors[name].detach() for name in base.factor_names)
    O, I = base.shape()  # noqa: E741 - the legend's letters
    if not base.one_matrix or A.shape[0] != r or A.numel() != r * I or B.shape[:2] != (O, r) or B.numel() != O * r:
        # Groups of a convolution, or experts that stand stacked: many products, not one.
        return None
    A_RI, B_OR = A.reshape(r, I), B.reshape(O, r)
    A0, B0 = (tensors.get(initial_name(name)) for name in base.factor_names)
    if A0 is None or B0 is None:
        return Factors(A_RI, B_OR, scaling, started=False)
    stacked_A, stacked_B = torch.cat([A_RI, A0.reshape(r, I)]), torch.cat([B_OR * scaling, -B0.reshape(O, r)], 1)
    return Factors(stacked_A, stacked_B, 1.0, started=True)


def is_product(variant: AbstractVariant) -> bool:
    """Whether a variant's update is ``scaling * (B A)`` of its factors as they are stored, on all tokens or some."""
    return type(variant) in {registry.load("variants", name).Variant for name in ("lora", "alora")}


def invocation(config: PeftConfig) -> tuple[int, ...]:
    """The tokens that an adapter is active from; empty for one that always is."""
    return tuple(config.alora_invocation_tokens or ()) if isinstance(config, LoraConfig) else ()


def bias_of(tensors: Mapping[str, Tensor], scaling: float) -> Tensor | None:
    """What an adapter with these tensors adds to the bias of its layer, as (O,), if it has one beside B."""
    return tensors[BIAS].detach() * scaling if BIAS in tensors else None


def stored(base: AbstractBase, A_RI: Tensor, B_OR: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Factors under the names and in the shapes that a base stores them in.

    Raises:
        UsageError: factors of this base are no single pair of matrices.
    """
    r = A_RI.shape[0]
    shapes = base.factor_shapes(r)
    if [torch.Size(shape).numel() for shape in shapes] != [A_RI.numel(), B_OR.numel()]:
        raise UsageError(
            f"The factors of a {type(base.module).__name__} are not one pair of matrices, so no update of rank {r} can "
            "be written for it; leave that module out."
        )
    found = {
        name: factor.reshape(shape).contiguous()
        for name, factor, shape in zip(base.factor_names, (A_RI, B_OR), shapes, strict=True)
    }
    return found if bias is None else {**found, BIAS: bias}


def plain_config(
    source: TunerConfig,
    ranks: Mapping[str, int],
    *,
    alphas: Mapping[str, float] | None = None,
    target_modules: list[str] | str | None = None,
    exclude_modules: list[str] | str | None = None,
    target_parameters: list[str] | None = None,
    modules_to_save: list[str] | None = None,
    bias: Literal["none", "all", "lora_only"] = "none",
    lora_bias: bool = False,
) -> LoraConfig:
    """The config of plain factors: one rank and alpha, and a pattern for every layer that has another one.

    Args:
        source: whose task, base model and dropout it keeps; its targets too, when none are given.
        ranks: from the path of each layer to its rank.
        alphas: from the path of each layer to its alpha; without them alpha equals the rank.
        target_modules: names that match exactly these layers.
        exclude_modules: names to leave out of them.
        target_parameters: parameters among these layers, where target_modules is given.
        modules_to_save: modules saved whole.
        bias: which biases of the base come along.
        lora_bias: whether there are biases beside B.
    """
    given = {path: float(r) for path, r in ranks.items()} if alphas is None else alphas
    r, alpha = int(_common(ranks)), _common(given)
    fields: dict[str, Any] = {
        "r": r,
        "lora_alpha": _whole(alpha),
        "rank_pattern": pattern({path: own for path, own in ranks.items() if own != r}, ranks),
        "alpha_pattern": pattern({path: _whole(own) for path, own in given.items() if own != alpha}, ranks),
        "modules_to_save": modules_to_save,
        "bias": bias,
        "lora_bias": lora_bias,
    }
    if target_modules is not None:
        fields |= {
            "target_modules": target_modules,
            "exclude_modules": exclude_modules,
            "target_parameters": target_parameters,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    names = {f.name for f in dataclasses.fields(LoraConfig)}
    if isinstance(source, LoraConfig):
        # How it was trained and started is over; what else it is, such as trained tokens, stays.
        fresh = LoraConfig()
        over: dict[str, Any] = {name: getattr(fresh, name) for name in _OVER & names}
        return dataclasses.replace(source, **over, **fields)
    shared = {
        f.name: getattr(source, f.name) for f in dataclasses.fields(TunerConfig) if f.name in names - {"peft_type"}
    }
    return LoraConfig(**{**shared, "lora_dropout": source.dropout, **fields})


_OVER = frozenset(
    {"use_rslora", "use_dora", "use_lorafa", "use_qalora", "qalora_group_size", "init_lora_weights"}
    | {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
)


def _common(values: Mapping[str, float]) -> float:
    """The value of the most layers; the largest of several."""
    return max(Counter(values.values()).items(), key=lambda item: (item[1], item[0]))[0]


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def pattern(values: Mapping[str, N], paths: Iterable[str]) -> dict[str, N]:
    """A rank_pattern or alpha_pattern that gives each of these layers its value and touches no other one.

    Keys are read as regular expressions that a path may end in, in no order that a file would keep; so a path that
    another one ends in is anchored.

    Args:
        values: from path to value.
        paths: all adapted layers.
    """
    every = list(paths)
    found = {}
    for path, value in values.items():
        expression = re.compile(rf"(.*\.)?({path})$") if _readable(path) else None
        alone = expression is not None and [p for p in every if expression.match(p)] == [path]
        found[path if alone else f"^{re.escape(path)}"] = value
    return found


def _readable(path: str) -> bool:
    return re.fullmatch(r"[\w.\-]+", path) is not None


def numbers(config: TunerConfig, path: str) -> tuple[int, float]:
    """The rank and alpha that a config gives the layer of a path."""
    return int(first_match(config.ranks, path, config.rank)), float(first_match(config.alphas, path, config.alpha))


def first_match(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first of these patterns that a path ends in, as PEFT reads rank_pattern and alpha_pattern."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def names_for(index: ModuleIndex, paths: Iterable[str]) -> tuple[list[str], list[str] | None]:
    """The shortest names whose modules are exactly these, as target_modules and exclude_modules.

    Args:
        index: the model's modules.
        paths: the modules wanted.
    """
    wanted = set(paths)
    names = index.shortest_names(wanted)
    matched = {path for name in names for path in index.by_suffix[name]}
    return names, sorted(matched - wanted) or None
