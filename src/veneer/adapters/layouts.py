"""What rearranges an adapter's factors knows them as one pair for each layer that is called; others are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.ties import TiedFactors
from veneer.core.errors import UsageError


def check_pairs(adapted: AdaptedModel, names: Iterable[str], doing: str) -> None:
    """Check that adapters have one pair of factors of their own on each layer.

    Raises:
        UsageError: one is on experts, on an attention, or shares the factors of tied embeddings.
    """
    for name in names:
        for path, layer in adapted.layers_of(name).items():
            held: Any = layer.shared.get(name)
            tied = isinstance(held, TiedFactors)
            if tied or layer.read:
                reason = "shares the factors of the embeddings" if tied else "has a layout of its own"
                raise UsageError(
                    f"Adapter {name!r} is on {path!r}, which {reason}, and {doing} knows one pair of factors for each "
                    "layer only; merge the adapter into the model instead."
                )


def check_pairs_in_file(config: Mapping[str, Any], doing: str) -> None:
    """The same for an adapter's config as it is read, before there is a model.

    Raises:
        UsageError: it has target_parameters or ensure_weight_tying.
    """
    for option in ("target_parameters", "ensure_weight_tying"):
        if config.get(option):
            raise UsageError(
                f"{option} is set, and {doing} knows one pair of factors for each layer only; merge the adapter into "
                "the model instead."
            )
