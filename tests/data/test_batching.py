from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from veneer.data.batching import LengthBatches

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=80)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3))
def test_every_index_comes_once_a_pass(lengths: list[int], batch_size: int, seed: int) -> None:
    batches = LengthBatches(lengths, batch_size, seed=seed)
    for _ in range(2):
        one_pass = list(batches)
        assert sorted(index for batch in one_pass for index in batch) == list(range(len(lengths)))
        assert len(one_pass) == len(batches)
        assert sorted(map(len, one_pass), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)


def test_the_order_follows_the_seed_and_changes_between_passes() -> None:
    lengths = list(range(40))
    first, again, other = (LengthBatches(lengths, 4, seed=seed) for seed in (1, 1, 2))
    one = list(first)
    assert one == list(again)
    assert one != list(other)
    assert one != list(first)


def test_similar_lengths_share_a_batch() -> None:
    lengths = [(index * 37) % 101 for index in range(256)]

    def padding(batches: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)

    unsorted = [list(range(start, start + 8)) for start in range(0, 256, 8)]
    assert padding(list(LengthBatches(lengths, 8, seed=0))) < padding(unsorted) / 5
