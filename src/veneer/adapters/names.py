"""Where an adapter's tensors stand under PEFT's names: ``base_layer`` comes into a path for every wrapper on the way.

A wrapper inside a wrapped module (the output projection of an attention), or around another wrapper (two parameters
of one module), has a longer name than its module in the untouched model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from veneer.adapters.index import Slot

INNER = ".base_layer"


@final
class Names:
    """The names among these adapted slots, and no others: in memory those of all adapters, on disk those of one."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self.around: dict[str, list[str]] = {}
        """From a module's path to the slots adapted in it, the innermost wrapper first."""
        self.owners: dict[str, str] = {}
        for slot in sorted(slots, key=lambda slot: slot.order):
            self.around.setdefault(slot.owner, []).append(slot.path)
            self.owners[slot.path] = slot.owner

    def wrapper(self, path: str) -> str:
        """The name of the wrapper that adapts a slot."""
        owner = self.owners[path]
        wrappers = self.around[owner]
        return self._below(owner) + INNER * (len(wrappers) - 1 - wrappers.index(path))

    def parameter(self, key: str) -> str:
        """The name of a parameter of the untouched model, behind all wrappers around its module."""
        path, dot, leaf = key.rpartition(".")
        return self._below(path) + INNER * len(self.around.get(path, ())) + dot + leaf

    def _below(self, path: str) -> str:
        name, parts = "", path.split(".")
        for end, part in enumerate(parts, 1):
            name += f".{part}" if name else part
            if end < len(parts):
                name += INNER * len(self.around.get(".".join(parts[:end]), ()))
        return name
