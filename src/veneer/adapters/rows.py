"""From ``trainable_token_indices`` to the tables and rows of a model.

Shape legend: D width, K trained rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from veneer.adapters.index import ModuleIndex, Slot
from veneer.core.errors import TargetError, listed, nearest

FIELD = "trainable_token_indices"


@dataclass(frozen=True)
class TokenRows:
    """The rows of one table that an adapter trains."""

    slot: Slot
    """The module whose path they are saved under."""
    indices: tuple[int, ...]
    """Token ids, in the order of the rows."""
    tied: tuple[Slot, ...]
    """Other modules that use the same table and get the same rows."""
    values: Tensor | None = None
    """(K, D) as loaded; None for rows that start as those of the table."""

    @property
    def shape(self) -> tuple[int, int]:
        """(K, D)."""
        return len(self.indices), table_of(self.slot.module).shape[1]

    @property
    def paths(self) -> tuple[str, ...]:
        """All modules that get the rows."""
        return (self.slot.path, *(slot.path for slot in self.tied))


def select_rows(index: ModuleIndex, wanted: Sequence[int] | Mapping[str, Sequence[int]]) -> tuple[TokenRows, ...]:
    """Resolve the config's field on a model.

    A list is for the input embedding. Names are endings of module paths. Modules that share the input embedding's
    table get its rows too, unless they are named with others.

    Raises:
        TargetError: no such module, one that is no plain table, or a token id that it does not have.
    """
    named = _named(index, wanted)
    for path, indices in named.items():
        _check_table(index.slots[path], indices)
    entry = index.input_path
    ours = named.get(entry) if entry is not None else None
    sharing = index.tied.get(entry, ()) if entry is not None and ours is not None else ()
    if any(named.get(other, ours) != ours for other in sharing):
        sharing = ()
    found = []
    for path, indices in named.items():
        if path in sharing:
            continue
        found.append(TokenRows(index.slots[path], indices, tuple(index.slots[o] for o in sharing if path == entry)))
        left = [other for other in index.tied.get(path, ()) if other not in named and other not in sharing]
        if left:
            warnings.warn(
                f"The rows of {path!r} are not trained in {listed(left)}, which share its weight; name them in {FIELD} "
                "too, or give a list for the input embedding and all that share it.",
                stacklevel=6,
            )
    return tuple(found)


def table_of(module: nn.Module) -> nn.Parameter:
    """The (V, D) weight of an embedding or a head."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _named(index: ModuleIndex, wanted: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """From module path to token ids."""
    if not isinstance(wanted, Mapping):
        if index.input_path is None:
            raise TargetError(
                f"{FIELD} is a list, which is for the input embedding, but this model names none "
                "(get_input_embeddings); give {module name: [token ids]}."
            )
        return {index.input_path: tuple(wanted)}
    named: dict[str, tuple[int, ...]] = {}
    for name, indices in wanted.items():
        paths = [path for path in index.slots if path.endswith(name)]
        if not paths:
            raise TargetError(
                f"{FIELD} has {name!r}, which matches no module of this model.{nearest(name, index.by_suffix)}"
            )
        for path in paths:
            if named.setdefault(path, tuple(indices)) != tuple(indices):
                raise TargetError(f"{FIELD} names {path!r} twice, with different token ids.")
    return named


def _check_table(slot: Slot, indices: tuple[int, ...]) -> None:
    plain = slot.kind == "embedding" or (slot.kind == "linear" and type(slot.module).forward is nn.Linear.forward)
    if not plain:
        raise TargetError(
            f"{FIELD} matches {slot.path!r}, a {type(slot.module).__name__}, which is no plain embedding table or "
            "head whose rows are tokens; name one that is."
        )
    rows = table_of(slot.module).shape[0]
    beyond = [index for index in indices if index >= rows]
    if beyond:
        raise TargetError(
            f"{FIELD} has {listed(map(str, beyond))}, but {slot.path!r} has rows 0 to {rows - 1}; for new tokens, call "
            f"model.resize_token_embeddings({max(beyond) + 1}) first."
        )
