from __future__ import annotations

import json
from typing import Any

import pytest

from tests import words
from veneer.core.errors import DataError
from veneer.data.rows import Row
from veneer.data.spans import encode_spans, question_of

CONTEXT = "I saw it in Paris, and the film was very good; so it was fine and not a poor film, and I saw it in Paris."
AT = CONTEXT.rindex("Paris")


def row(**values: Any) -> Row:
    return Row(
        "a.jsonl:3",
        {"question": "a good film?", "context": CONTEXT, "answers": {"text": ["Paris"], "answer_start": [AT]}} | values,
    )


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Paris"], "answer_start": [AT]},
        [{"text": "Paris", "answer_start": AT}],
        {"text": "Paris", "answer_start": AT},
        json.dumps({"text": ["Paris"], "answer_start": [AT]}),
        json.dumps([{"text": "Paris", "answer_start": AT}]),
    ],
)
def test_answers_as_datasets_and_squad_have_them(answers: Any) -> None:
    assert question_of(row(answers=answers)).answers == ((AT, "Paris"),)


@pytest.mark.parametrize("answers", [None, "", [], {"text": [], "answer_start": []}, "[]"])
def test_no_answer(answers: Any) -> None:
    assert question_of(row(answers=answers)).answers == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"answers": {"text": ["Paris"], "answer_start": [AT + 1]}},
            rf"a.jsonl:3 has the answer 'Paris' at character {AT + 1} of .*, where 'aris.' stands; it is at 12.",
        ),
        ({"answers": [{"text": "Rome", "answer_start": 0}]}, "'Rome' at character 0 .* 'I sa' stands; it is nowhere"),
        ({"answers": [{"text": "Paris", "answer_start": -5}]}, r"nothing is \(it has 105\) stands"),
        ({"answers": [{"text": "Paris", "answer_start": 400}]}, r"nothing is \(it has 105\) stands"),
        ({"answers": [{"text": " ", "answer_start": 1}]}, "an answer without text; .* an empty list"),
        ({"answers": {"text": ["Paris", "film"], "answer_start": [12]}}, "expected texts with the characters"),
        ({"answers": [{"text": "Paris"}]}, "a.jsonl:3 has answers = .*; expected texts with the characters"),
        ({"answers": ["Paris"]}, "expected texts with the characters"),
        ({"answers": "Paris"}, "expected texts with the characters"),
        ({"context": " "}, "a.jsonl:3 has an empty context"),
        ({"context": None}, "a.jsonl:3 has no context"),
        ({"question": 3}, "a.jsonl:3 has question = 3; expected text"),
    ],
)
def test_a_row_that_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        question_of(row(**values))


def test_the_nearest_name_of_the_column_is_shown() -> None:
    values = {"question": "a?", "context": "b", "answer": []}
    with pytest.raises(DataError, match=r"has no answers; its columns are question, context, answer. Did you mean"):
        question_of(Row("x:1", values))
    assert question_of(Row("x:1", values), labelled=False).answers is None


@pytest.mark.parametrize("stride", [0, 3, 9])
def test_windows_are_those_of_the_tokenizer(stride: int) -> None:
    tokenizer, question = words.tokenizer(), question_of(row())
    found = encode_spans([row()], [question], tokenizer, max_length=20, stride=stride, truncate="end")
    expected = tokenizer(
        question.asked,
        CONTEXT,
        truncation="only_second",
        max_length=20,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [one.input_ids for one in found.examples] == expected["input_ids"]
    assert [one.more["token_type_ids"] for one in found.examples] == expected["token_type_ids"]
    assert (found.report.rows, found.report.examples) == (1, len(expected["input_ids"]))
    # In a window that has the answer, the labelled tokens are the answer; elsewhere, they are the first token.
    inside = 0
    for at, one in enumerate(found.examples):
        places = [place for place, of in enumerate(expected.sequence_ids(at)) if of == 1]
        whole = [expected["offset_mapping"][at][place] for place in places]
        if whole[0][0] <= AT and whole[-1][1] >= AT + 5:
            inside += 1
            first, last = (expected["offset_mapping"][at][place] for place in one.labels)
            assert CONTEXT[first[0] : last[1]] == "Paris"
        else:
            assert one.labels == [0, 0]
        first, offsets, text = one.more["first"], one.more["offsets"], one.more["text"]
        assert first == places[0]
        assert [text[a:b] for a, b in offsets] == [CONTEXT[a:b] for a, b in whole]
        assert CONTEXT[one.more["at"] :].startswith(text)
    assert inside >= 1


def test_what_is_too_long() -> None:
    tokenizer, question = words.tokenizer(), question_of(row())
    given: dict[str, Any] = {"tokenizer": tokenizer, "max_length": 20, "stride": 4}
    assert encode_spans([row()], [question], truncate="drop", **given).report.dropped == 1
    with pytest.raises(DataError, match=r"a.jsonl:3 has 37 tokens, and at most 20 are taken; .* for windows, or drop"):
        encode_spans([row()], [question], truncate="fail", **given)
    whole, from_start = (encode_spans([row()], [question], truncate=how, **given) for how in ("end", "start"))
    assert whole.examples == from_start.examples
    with pytest.raises(DataError, match=r"a question of 4 tokens, which leaves 13 of 20 .* stride = 13 in common"):
        encode_spans([row()], [question], truncate="end", **{**given, "stride": 13})
    with pytest.raises(DataError, match=r"leaves 0 of 7 to its context"):
        encode_spans([row()], [question], truncate="end", **{**given, "max_length": 7, "stride": 0})
    # One that is short enough needs no windows, and so no stride.
    one = encode_spans([row()], [question], truncate="fail", **{**given, "max_length": 64, "stride": 1000})
    assert one.report.examples == 1


def test_an_answer_of_half_a_word_is_given_its_token() -> None:
    half = row(answers=[{"text": "ari", "answer_start": AT + 1}])
    (one,) = encode_spans(
        [half], [question_of(half)], words.tokenizer(), max_length=64, stride=0, truncate="end"
    ).examples
    first, offsets = one.more["first"], one.more["offsets"]
    assert [CONTEXT[slice(*offsets[place - first])] for place in one.labels] == ["Paris", "Paris"]


def test_an_answer_without_a_token_is_refused() -> None:
    nothing = row(context="it was fine \u200b\u200b", answers=[{"text": "\u200b", "answer_start": 12}])
    with pytest.raises(DataError, match="of which the tokenizer makes no token"):
        encode_spans([nothing], [question_of(nothing)], words.tokenizer(), max_length=64, stride=0, truncate="end")
