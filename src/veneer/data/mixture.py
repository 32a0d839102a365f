"""A mixture: parts of the training data, each with its share of every pass."""

from __future__ import annotations

import functools
import math
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import final

from veneer.core.errors import ConfigError

Named = str | Sequence[str] | Mapping[str, float]
"""Names of data: one, several (with ``=WEIGHT`` behind each or none), or from each name to its weight."""


def weighed(given: Named) -> list[tuple[str, float | None]]:
    """The names of a training set's parts with their weights, which are None when nothing is weighed.

    >>> weighed(["code.jsonl=3", "chat.jsonl=1"])
    [('code.jsonl', 3.0), ('chat.jsonl', 1.0)]

    What stands behind the last ``=`` is a weight when it is a number and no file has the whole name.

    Raises:
        ConfigError: a weight that is not positive and finite, a name twice, or a weight for some of them only.
    """
    if isinstance(given, Mapping):
        found: list[tuple[str, float | None]] = list(given.items())
    else:
        found = [_split(name) for name in ([given] if isinstance(given, str) else given)]
    if not found:
        raise ConfigError("data is an empty list; expected at least one file or folder.")
    names = [name for name, _ in found]
    for name, weight in found:
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"The weight of data {name!r} is {weight}; expected a positive number.")
        if names.count(name) > 1:
            raise ConfigError(f"data {name!r} is named twice; expected each part once, with its weight in all.")
    bare = [name for name, weight in found if weight is None]
    if bare and len(bare) < len(found):
        raise ConfigError(f"data {bare[0]!r} has no weight; expected one for each part or for none: {bare[0]}=1.")
    return found


def _split(text: str) -> tuple[str, float | None]:
    name, sign, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        return text, None
    return (name, weight) if sign and name and not Path(text).expanduser().exists() else (text, None)


@final
@dataclass(frozen=True)
class Mixture:
    """How often the examples of each part come in a pass: a pure function of the seed and the number of the pass.

    >>> Mixture(sizes=[900, 100], weights=[1, 1]).taken
    (500, 500)

    A pass has as many examples as all parts together, shared out by the weights to whole numbers (the largest
    remainders get what rounding leaves; no part gets none). Every part is gone through in an order drawn anew for
    each of its rounds, and each pass goes on where the last one ended: no example comes again before all others of its
    part came.
    """

    sizes: Sequence[int]
    """Examples of each part, which stand one part behind the other."""
    weights: Sequence[float]
    """Positive; only their ratios count."""

    def to_dict(self) -> dict[str, list[float]]:
        """Sizes and weights as JSON values."""
        return {"sizes": list(self.sizes), "weights": list(self.weights)}

    @functools.cached_property
    def taken(self) -> tuple[int, ...]:
        """How many examples of each part are in a pass."""
        whole = sum(map(Fraction, self.weights))
        wanted = [sum(self.sizes) * Fraction(weight) / whole for weight in self.weights]
        found = [math.floor(share) for share in wanted]
        by_rest = sorted(range(len(found)), key=lambda at: (found[at] - wanted[at], at))
        for at in by_rest[: sum(self.sizes) - sum(found)]:
            found[at] += 1
        return tuple(max(1, count) for count in found)

    def order(self, seed: int, number: int) -> array[int]:
        """The examples of a pass (counted from 0), part by part."""
        found: array[int] = array("q")
        begin = 0
        for part, (size, taken) in enumerate(zip(self.sizes, self.taken, strict=True)):
            start, stop = number * taken, (number + 1) * taken
            for turn in range(start // size, -(-stop // size)):
                order = array("q", range(begin, begin + size))
                random.Random(f"{seed}/{part}/{turn}").shuffle(order)
                found += order[max(0, start - turn * size) : stop - turn * size]
            begin += size
        return found
