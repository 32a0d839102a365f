from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from veneer.data.collate import collate
from veneer.data.encode import IGNORED, Encoded

EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=7).map(
        lambda tokens: Encoded("f:1", [t for t, _ in tokens], [t if flag else IGNORED for t, flag in tokens])
    ),
    min_size=1,
    max_size=5,
)


@given(EXAMPLES, st.integers(0, 9))
def test_every_sequence_comes_back_by_its_mask_whatever_the_pad_id(examples: list[Encoded], pad_id: int) -> None:
    batch = collate(examples, pad_id=pad_id)
    assert {tensor.shape for tensor in batch.values()} == {(len(examples), max(len(e.input_ids) for e in examples))}
    for row, example in enumerate(examples):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == example.input_ids
        assert batch["labels"][row][real].tolist() == example.labels
        assert (batch["labels"][row][~real] == IGNORED).all()
        assert (batch["input_ids"][row][~real] == pad_id).all()
