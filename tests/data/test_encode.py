from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import chat
from veneer.core.errors import DataError
from veneer.data.encode import IGNORED, EncodedSet, check_trained, encode, joined
from veneer.data.formats import recognise
from veneer.data.masking import masked
from veneer.data.sources import rows_of

TOKENIZER = chat.tokenizer()


def test_labels_are_the_ids_where_trained() -> None:
    result = encode(recognise(rows_of(chat.pairs(6))), TOKENIZER, max_length=100)
    for example, row in zip(result.examples, chat.pairs(6), strict=True):
        assert len(example.input_ids) == len(example.labels)
        trained = [label for label in example.labels if label != IGNORED]
        assert TOKENIZER.decode(trained) == row["completion"] + "<|end|>"
        assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
        assert example.trained == len(trained)
    assert result.report.trained_tokens == sum(example.trained for example in result.examples)
    assert result.report.truncated == result.report.tokens_cut == result.report.left_out == 0


@given(st.integers(2, 60))
def test_what_is_cut_is_counted(max_length: int) -> None:
    samples = recognise(rows_of(chat.pairs(8)))
    whole = encode(samples, TOKENIZER, max_length=10_000)
    cut = encode(samples, TOKENIZER, max_length=max_length)
    if all(True not in masked(sample, TOKENIZER, completions_only=True)[0].trained[:max_length] for sample in samples):
        with pytest.raises(DataError, match=f"max_length={max_length}, before their answers"):
            check_trained(cut.report, max_length)
    lengths = [len(example.input_ids) for example in whole.examples]
    assert cut.report.truncated == sum(length > max_length for length in lengths)
    assert cut.report.tokens_cut == sum(max(0, length - max_length) for length in lengths)
    assert cut.report.examples + cut.report.left_out == len(lengths)
    assert cut.report.longest <= max_length
    assert all(example.trained for example in cut.examples)


def test_the_first_token_is_never_trained() -> None:
    (example,) = encode(recognise(rows_of([{"text": "red stone"}])), TOKENIZER, max_length=10).examples
    assert example.labels == [IGNORED, *example.input_ids[1:]]


def test_a_set_without_a_trained_token_is_refused() -> None:
    rows = rows_of([{"messages": [{"role": "user", "content": "u"}]}] * 2)
    with pytest.raises(DataError, match="None of the 2 rows has a token to train"):
        check_trained(encode(recognise(rows), TOKENIZER, max_length=10).report, 10)


def test_rows_without_a_trained_token_are_left_out_and_counted() -> None:
    rows = rows_of([{"messages": [{"role": "user", "content": "u"}]}, {"text": "red"}])
    result = encode(recognise(rows), TOKENIZER, max_length=10)
    assert (result.report.rows, result.report.examples, result.report.left_out) == (2, 1, 1)


def test_sets_one_behind_the_other() -> None:
    parts = [encode(recognise(rows_of(chat.pairs(count))), TOKENIZER, max_length=20) for count in (3, 1, 5)]
    whole = joined(parts)
    every = [example for part in parts for example in part.examples]
    assert list(whole.examples) == [whole.examples[at] for at in range(-9, 0)] == every
    assert whole.examples[1:7:2] == every[1:7:2]
    assert list(whole.lengths) == [len(example.input_ids) for example in every]
    assert whole.fingerprint == EncodedSet(every, whole.report).fingerprint
    for name in ("rows", "examples", "tokens", "trained_tokens", "truncated", "tokens_cut"):
        assert getattr(whole.report, name) == sum(getattr(part.report, name) for part in parts)
    assert whole.report.longest == max(part.report.longest for part in parts)
    with pytest.raises(IndexError):
        whole.examples[9]
