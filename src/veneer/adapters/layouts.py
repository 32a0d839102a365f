"""Adapters whose factors are not one pair for each layer that is called: those of experts, and those shared by ties."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.layer import AdaptedLayer
from veneer.adapters.ties import TiedFactors
from veneer.core.errors import UsageError, listed
from veneer.core.records import ApproximatedLayer


def is_tied(layer: AdaptedLayer, name: str) -> bool:
    """Whether an adapter has no factors of its own on a layer: those of the embeddings, transposed."""
    held: Any = layer.shared.get(name)
    return isinstance(held, TiedFactors)


def check_ties(adapted: AdaptedModel, names: Sequence[str]) -> None:
    """Check that either all of these adapters share the factors of the embeddings, or none does.

    Raises:
        UsageError: some do and some do not, so that together they are no update of one table.
    """
    tied = {
        name: tuple(path for path, layer in adapted.layers_of(name).items() if is_tied(layer, name)) for name in names
    }
    if len(set(tied.values())) > 1:
        some = next(name for name in names if tied[name])
        other = next(name for name in names if tied[name] != tied[some])
        raise UsageError(
            f"Adapter {some!r} has one update for the embeddings and {listed(tied[some])} (ensure_weight_tying), and "
            f"{other!r} has not, so no one adapter does what they do together; merge one of them into the model first."
        )


def split(A: Tensor, B: Tensor, r: int) -> list[tuple[Tensor, Tensor]]:
    """The factors of each expert, as (R, I) and (O, R): A is (E R, I) with an expert's rows together, B (O, R E)."""
    experts = A.shape[0] // r
    return list(zip(A.view(experts, r, -1), B.view(B.shape[0], r, experts).unbind(2), strict=True))


def joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The opposite of ``split``."""
    return torch.cat([A for A, _ in pairs]), torch.stack([B for _, B in pairs], 2).flatten(1)


def together(path: str, experts: Sequence[ApproximatedLayer]) -> ApproximatedLayer:
    """What became of the experts of one parameter, as of one layer: shares and errors are weighed by their energy."""
    first = experts[0]
    if first.norm is None:
        return replace(first, path=path)
    energies = [(one.norm or 0.0) ** 2 for one in experts]
    total = sum(energies)
    if not total:
        return replace(first, path=path, norm=0.0)
    kept = sum(energy * one.kept for energy, one in zip(energies, experts, strict=True)) / total
    missed = sum(energy * one.error**2 for energy, one in zip(energies, experts, strict=True)) / total
    return replace(first, path=path, norm=math.sqrt(total), kept=kept, error=math.sqrt(missed))


def check_attention(adapted: AdaptedModel, name: str) -> None:
    """Check that an adapter is on no attention as a whole, whose two weights have one rank.

    Raises:
        UsageError: it is.
    """
    for path, layer in adapted.layers_of(name).items():
        if layer.kind == "attention":
            raise UsageError(
                f"Adapter {name!r} is on {path!r}, an attention whose two weights have one rank, and converting gives "
                "each layer the rank that it needs; merge the adapter into the model instead."
            )


def check_pairs_in_file(config: Mapping[str, Any], doing: str) -> None:
    """Check an adapter's config as it is read, before there is a model that says what its tensors are.

    Raises:
        UsageError: it has target_parameters or ensure_weight_tying.
    """
    for option in ("target_parameters", "ensure_weight_tying"):
        if config.get(option):
            raise UsageError(
                f"{option} is set, and {doing} knows one pair of factors for each layer only; merge the adapter into "
                "the model instead."
            )
