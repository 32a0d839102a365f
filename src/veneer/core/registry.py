"""The file name is the registry key: ``variants/dora.py`` is the variant ``dora``, loaded when asked for."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

from veneer.core.errors import ConfigError, listed, nearest

_ROOT = Path(__file__).resolve().parent.parent


@cache
def names(room: str) -> tuple[str, ...]:
    """The keys of a room ("bases", "variants", "inits"), sorted; nothing is imported."""
    return tuple(sorted(path.stem for path in (_ROOT / room).glob("*.py") if not path.stem.startswith("_")))


@cache
def load(room: str, name: str) -> ModuleType:
    """The module behind a key.

    Raises:
        ConfigError: no file of that name; the message lists what there is.
    """
    if name not in names(room):
        raise ConfigError(
            f"{name!r} is not one of the {room} of this release: {listed(names(room), most=40)}."
            f"{nearest(name, names(room))}"
        )
    return importlib.import_module(f"veneer.{room}.{name}")
