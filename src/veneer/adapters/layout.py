"""Models whose rows are known not to stand one after the other inside, so that adapters cannot be mixed in a batch."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from veneer.core.errors import UsageError

if TYPE_CHECKING:
    from veneer.adapters.adapted import AdaptedModel

# Their sequences come first inside, whatever the batch looks like outside.
_SEQUENCE_FIRST = frozenset({"xlnet"})


def check_layout(adapted: AdaptedModel, names: Collection[str]) -> None:
    """Refuse to mix adapters where shapes alone would not tell that a layer has its rows in another order.

    Args:
        adapted: the model.
        names: the adapters of the batch.

    Raises:
        UsageError: the model, or a layer of one of the adapters, is of such a kind.
    """
    reason = None
    if adapted.index.model_type in _SEQUENCE_FIRST:
        reason = f"a model of type {adapted.index.model_type!r} does not keep the rows of a batch first"
    for path, layer in adapted.layers.items():
        if _is_expert(path) and any(name in layer.specs for name in names):
            reason = f"{path!r} is an expert, which gets tokens of several rows at once"
    turned = next((s.path for s in adapted.index.slots.values() if s.module.__dict__.get("batch_first") is False), None)
    if turned is not None:
        reason = f"{turned!r} has batch_first=False"
    if reason is not None:
        raise UsageError(f"adapter_names cannot mix adapters here, since {reason}; run them one after the other.")


@functools.cache
def _is_expert(path: str) -> bool:
    return re.search(r"(^|\.)experts\.\d+(\.|$)", path) is not None
