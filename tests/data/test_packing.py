from __future__ import annotations

from hypothesis import given

from tests.data.test_collate import EXAMPLES
from veneer.data.collate import collate, tokens
from veneer.data.encode import Encoded
from veneer.data.packing import pack


@given(EXAMPLES)
def test_every_sequence_comes_back_from_where_positions_begin_anew(examples: list[Encoded]) -> None:
    row = {key: tensor[0].tolist() for key, tensor in pack(examples).items()}
    starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
    ends = [*starts[1:], len(row["input_ids"])]
    found = [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in zip(starts, ends, strict=True)]
    assert found == [(example.input_ids, example.labels) for example in examples]


@given(EXAMPLES)
def test_sequences_of_one_length_are_rows_without_a_mask(examples: list[Encoded]) -> None:
    batch = collate(examples, pad_id=0, packed=True)
    assert "attention_mask" not in batch
    assert tokens(batch) == sum(len(example.input_ids) for example in examples)
    even = len({len(example.input_ids) for example in examples}) == 1
    assert ("position_ids" in batch) == (not even)
    assert batch["input_ids"].shape[0] == (len(examples) if even else 1)


@given(EXAMPLES)
def test_padding_is_not_counted(examples: list[Encoded]) -> None:
    assert tokens(collate(examples, pad_id=0)) == sum(len(example.input_ids) for example in examples)
