"""Values that several fields of configs take: token ids and ranges of layers."""

from __future__ import annotations

from typing import Any

from veneer.core.errors import ConfigError

_TOO_MANY = 2**31
"""More than any vocabulary."""
_DEEPEST = 10_000
"""More layers than any model."""


def layer_ranges(name: str, value: Any) -> list[list[int]] | None:
    """Pairs of layer numbers, each [start, end) with at least one layer, as lists; None for none.

    Raises:
        ConfigError: they are not.
    """
    if value is None or value == []:
        return None
    pairs = list(value) if isinstance(value, list | tuple) else [value]
    for pair in pairs:
        numbers = list(pair) if isinstance(pair, list | tuple) else []
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if len(numbers) != 2 or not whole or not 0 <= numbers[0] < numbers[1]:
            raise ConfigError(
                f"{name} has {pair!r}; expected ranges of layers [[start, end], ...], each from start to before end."
            )
    layers = sum(end - start for start, end in pairs)
    if layers > _DEEPEST:
        raise ConfigError(f"{name} makes a model of {layers} layers; expected at most {_DEEPEST}.")
    return [list(pair) for pair in pairs]


def sequence_of_ids(name: str, value: Any) -> None:
    """Refuse anything but a list of token ids with at least one.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{name} is {value!r}; expected a list of token ids.")
    for token in value:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < _TOO_MANY:
            raise ConfigError(f"{name} has {token!r}; expected token ids, whole numbers from 0.")


def token_ids(name: str, value: Any) -> None:
    """Refuse anything but None, a list of different token ids, and a mapping from module names to such lists.

    Raises:
        ConfigError: it is not.
    """
    if value is None:
        return
    for where, ids in value.items() if isinstance(value, dict) else [("", value)]:
        given = f"{name}[{where!r}]" if where else name
        if not isinstance(where, str) or not isinstance(ids, list | tuple) or not ids:
            raise ConfigError(f"{given} is {ids!r}; expected a list of token ids, or {{module name: [token ids]}}.")
        sequence_of_ids(given, ids)
        if len(set(ids)) < len(ids):
            raise ConfigError(f"{given} names token {next(t for t in ids if ids.count(t) > 1)} twice.")
