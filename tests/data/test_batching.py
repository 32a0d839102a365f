from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.batching import Batching, padding
from veneer.data.mixture import Mixture

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=80)


def indices(step: tuple) -> list[int]:
    return [index for share in step for micro in share if micro.counts for index in micro.indices]


@given(LENGTHS, st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(1, 120))
def test_every_example_comes_once_a_pass(
    lengths: list[int], batch_size: int, accumulation: int, processes: int, packed: bool, most: int
) -> None:
    batching = Batching(lengths, batch_size, accumulation, processes, packed, most, seed=1)
    for number in range(2):
        steps = list(batching.steps(number))
        assert sorted(index for step in steps for index in indices(step)) == list(range(len(lengths)))
        assert len(steps) == batching.steps_per_pass
        whole = batch_size * accumulation * processes
        sizes = sorted((len(indices(step)) for step in steps), reverse=True)
        assert sizes[:1] <= [whole]
        # Of padded batches one is odd, in any step, and the last step may have fewer of them.
        assert sizes[: -1 if packed else -2] == [whole] * (len(steps) - (1 if packed else 2))


@given(LENGTHS, st.integers(1, 9), st.integers(1, 3), st.booleans(), st.integers(1, 120))
def test_processes_wait_for_each_other_equally_often(
    lengths: list[int], batch_size: int, processes: int, packed: bool, most: int
) -> None:
    for step in Batching(lengths, batch_size, 2, processes, packed, most).steps(0):
        assert len(step) == processes
        assert len({len(share) for share in step}) == 1
        assert all(micro.indices for share in step for micro in share)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 3), st.integers(1, 120))
def test_packed_batches_keep_to_the_most_tokens(lengths: list[int], batch_size: int, processes: int, most: int) -> None:
    for step in Batching(lengths, batch_size, 2, processes, packed=True, max_tokens=most).steps(0):
        for micro in (micro for share in step for micro in share):
            assert len(micro.indices) == 1 or sum(lengths[i] for i in micro.indices) <= most


def test_packed_without_a_limit_is_one_batch_a_step() -> None:
    steps = Batching([7] * 24, 4, 2, packed=True).steps(0)
    assert [[len(micro.indices) for micro in share] for step in steps for share in step] == [[8]] * 3


@pytest.mark.parametrize("packed", [False, True])
def test_the_order_follows_the_seed_and_changes_between_passes(packed: bool) -> None:
    lengths = list(range(1, 41))
    first, again, other = (Batching(lengths, 4, packed=packed, seed=seed) for seed in (1, 1, 2))
    assert list(first.steps(0)) == list(again.steps(0))
    assert list(first.steps(0)) != list(other.steps(0))
    assert list(first.steps(0)) != list(first.steps(1))


def test_similar_lengths_share_a_padded_batch() -> None:
    lengths = [(index * 37) % 101 for index in range(256)]

    def filled(batches: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)

    unsorted = [list(range(start, start + 8)) for start in range(0, 256, 8)]
    assert filled([indices(step) for step in Batching(lengths, 8).steps(0)]) < filled(unsorted) / 5


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 9)), min_size=1, max_size=4),
    *(st.integers(1, 9), st.integers(1, 3), st.booleans()),
)
def test_a_pass_over_a_mixture_takes_what_the_weights_say(
    parts: list[tuple[int, float]], batch_size: int, processes: int, packed: bool
) -> None:
    mixture = Mixture([size for size, _ in parts], [weight for _, weight in parts])
    lengths = [1 + index % 7 for index in range(sum(mixture.sizes))]
    batching = Batching(lengths, batch_size, 2, processes, packed, 20, seed=3, mixture=mixture)
    for number in (0, 1, 4):
        steps = list(batching.steps(number))
        assert steps == list(batching.steps(number))
        assert len(steps) == batching.steps_per_pass
        taken = sorted(index for step in steps for index in indices(step))
        assert taken == sorted(mixture.order(3, number))


def test_padding() -> None:
    assert padding([4, 4, 4], 2) == 0.0
    assert padding([1, 3], 2) == pytest.approx(1 - 4 / 6)
