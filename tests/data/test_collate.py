from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.collate import collate, tokens
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


def test_tokens_are_those_read_else_those_written_else_the_examples() -> None:
    ids, mask = torch.tensor([[1, 2, 0], [3, 4, 5]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    written = torch.tensor([[7, IGNORED], [8, 9]])
    seen = torch.zeros(2, 3, 4, 4)
    assert tokens({"input_ids": ids, "attention_mask": mask, "labels": written}) == 5
    assert tokens({"input_ids": ids}) == 6
    assert tokens({"input_features": seen, "labels": written}) == 3
    assert tokens({"pixel_values": seen, "labels": torch.tensor([0, 1])}) == 2
    assert tokens({"pixel_values": seen, "labels": torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])}) == 2
    assert tokens({"pixel_values": seen}) == 2
