"""Parts with weights: what a name says, and which examples a pass takes."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.core.errors import ConfigError
from veneer.data.mixture import Mixture, weighed


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("a.jsonl", [("a.jsonl", None)]),
        (["a.jsonl", "b"], [("a.jsonl", None), ("b", None)]),
        (["a.jsonl=3", "b=0.5"], [("a.jsonl", 3.0), ("b", 0.5)]),
        ({"a.jsonl": 3, "b=c": 1.5}, [("a.jsonl", 3), ("b=c", 1.5)]),
        # Only a number is a weight: folders are called so too.
        ("year=new/a.jsonl", [("year=new/a.jsonl", None)]),
        ("=3", [("=3", None)]),
    ],
)
def test_names_and_weights(given: object, found: list[tuple[str, float | None]]) -> None:
    assert weighed(given) == found


def test_a_file_that_is_called_like_a_weight(tmp_path: Path) -> None:
    (tmp_path / "year=2024").mkdir()
    assert weighed(f"{tmp_path}/year=2024") == [(f"{tmp_path}/year=2024", None)]
    assert weighed(f"{tmp_path}/year=2024=2") == [(f"{tmp_path}/year=2024", 2.0)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a=0", "b=1"], "The weight of data 'a' is 0.0; expected a positive number"),
        (["a=-1"], "'a' is -1.0"),
        (["a=nan"], "'a' is nan"),
        (["a=1e999"], "'a' is inf"),
        ({"a": math.inf}, "'a' is inf"),
        (["a=1", "b"], "data 'b' has no weight; expected one for each part or for none: b=1"),
        (["a=1", "a=2"], "data 'a' is named twice"),
        (["a", "a"], "data 'a' is named twice"),
        ([], "data is an empty list"),
    ],
)
def test_what_is_no_mixture(given: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        weighed(given)


@pytest.mark.parametrize(
    ("sizes", "weights", "taken"),
    [
        ([900, 100], [1, 1], (500, 500)),
        ([900, 100], [900, 100], (900, 100)),
        ([10, 10, 10], [1, 1, 2], (8, 7, 15)),
        ([7], [0.3], (7,)),
        # No part gets none.
        ([3, 2], [1000, 1], (5, 1)),
    ],
)
def test_how_much_of_each_part_a_pass_takes(sizes: list[int], weights: list[float], taken: tuple[int, ...]) -> None:
    assert Mixture(sizes, weights).taken == taken


PARTS = st.lists(st.tuples(st.integers(1, 40), st.floats(1e-3, 1e3)), min_size=1, max_size=5)


@given(PARTS, st.integers(0, 5))
def test_nothing_comes_again_before_all_others_came(parts: list[tuple[int, float]], seed: int) -> None:
    mixture = Mixture([size for size, _ in parts], [weight for _, weight in parts])
    passes = 4
    found = [index for number in range(passes) for index in mixture.order(seed, number)]
    counts = Counter(found)
    begin = 0
    for size, taken in zip(mixture.sizes, mixture.taken, strict=True):
        times = [counts[index] for index in range(begin, begin + size)]
        assert sum(times) == passes * taken
        assert max(times) - min(times) <= 1
        begin += size
    assert len(found) == sum(counts.values())


def test_the_seed_and_the_number_of_the_pass_decide() -> None:
    mixture = Mixture([50, 50], [3, 1])
    assert mixture.order(1, 2) == Mixture([50, 50], [6, 2]).order(1, 2)
    assert mixture.order(1, 2) != mixture.order(2, 2)
    assert sorted(mixture.order(1, 2)) != sorted(mixture.order(1, 3))
