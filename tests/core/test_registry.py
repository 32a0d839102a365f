"""The file name is the key: what is in a room is what can be chosen."""

from __future__ import annotations

import pytest

from veneer import ConfigError
from veneer.core import registry


@pytest.mark.parametrize("room", ["bases", "variants", "inits"])
def test_every_file_is_a_key_and_loads(room: str) -> None:
    names = registry.names(room)
    assert names == tuple(sorted(names))
    for name in names:
        assert registry.load(room, name).__name__ == f"veneer.{room}.{name}"


@pytest.mark.parametrize("name", ["linaer", "__init__", "../core/errors", "os", ""])
def test_other_names_are_refused_and_nothing_is_imported(name: str) -> None:
    with pytest.raises(ConfigError, match="is not one of the bases"):
        registry.load("bases", name)
    with pytest.raises(ConfigError, match="'linear'"):
        registry.load("bases", "linaer")
