from __future__ import annotations

import json
from typing import Any

import pytest

from tests import chat, words
from veneer.core.errors import DataError
from veneer.data.choices import choice_of, encode_choices
from veneer.data.encode import EncodedSet
from veneer.data.rows import Row

TEXTS = ["very good", "very bad", "a film", "not so fine"]


def row(**values: Any) -> Row:
    return Row("a.jsonl:3", {"question": "the film was", "choices": TEXTS, "answer": 2, **values})


@pytest.mark.parametrize("answer", [2, "2", "C", "a film"])
def test_an_answer_is_a_place_a_letter_or_a_text(answer: Any) -> None:
    assert choice_of(row(answer=answer)).right == 2


def test_choices_are_a_list_its_json_named_texts_or_columns() -> None:
    expected = choice_of(row())
    assert (expected.context, expected.question, expected.choices) == ("the film was", "", tuple(TEXTS))
    assert choice_of(row(choices=json.dumps(TEXTS))) == expected
    assert choice_of(row(choices={"text": TEXTS, "label": list("ABCD")}, answer="C")) == expected
    # As ARC has some: numbers from 1 on are their names.
    assert choice_of(row(choices={"text": TEXTS, "label": list("1234")}, answer="3")) == expected
    columns = {f"ending{at}": text for at, text in enumerate(TEXTS)}
    assert choice_of(row(choices=None, **columns, ending4="")) == expected
    swag = choice_of(row(choices=None, **columns, context="i saw a film.", question="it was"))
    assert (swag.context, swag.question) == ("i saw a film.", "it was")
    assert choice_of(row(question=None, context="the film was")) == expected
    assert choice_of(row(answer="nonsense"), labelled=False).right is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"answer": 4}, r"a.jsonl:3 has answer = 4, none of its 4 choices; expected a place from 0 to 3, one of A, B"),
        ({"answer": -1}, "none of its 4 choices"),
        ({"answer": "E"}, "none of its 4 choices"),
        ({"answer": "9"}, "none of its 4 choices"),
        ({"answer": True}, "none of its 4 choices"),
        ({"answer": "a flim"}, "Did you mean 'a film'"),
        ({"answer": None, "answers": 1}, "a.jsonl:3 has no answer; its columns are .*"),
        ({"answer": "1", "choices": ["3", "5", "1"]}, "answer = '1', which could mean '5' and '1'"),
        ({"answer": "a", "choices": ["a", "a", "b"]}, "answer 'a', which is the text of 2 choices"),
        ({"choices": None}, "has no choices, and no ending0, ending1, ...; its columns are"),
        ({"choices": "a, b"}, "choices = 'a, b'; expected a list of texts"),
        ({"choices": ["a"]}, "has 1 choices; expected at least two"),
        ({"choices": ["a", 3]}, "has choices = 3; expected text"),
        ({"choices": ["a", " "]}, "a choice without text"),
        ({"choices": {"text": TEXTS, "label": ["A"]}}, "4 texts in choices and labels"),
        ({"choices": None, "ending0": "a", "ending2": "b"}, "has no ending1, and has ending2"),
        ({"question": None}, "has no question"),
        ({"question": " "}, "has an empty question"),
    ],
)
def test_a_row_that_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        choice_of(row(**values))


def encoded(one: Row, **how: Any) -> EncodedSet:
    tokenizer = chat.tokenizer() if how["likelihood"] else words.tokenizer()
    return encode_choices([one], [choice_of(one)], tokenizer, **{"max_length": 64, "truncate": "end", **how})


def test_an_encoder_is_given_pairs() -> None:
    tokenizer = words.tokenizer()
    swag = row(context="i saw a film.", question="it was")
    for one, first, second in ((row(), "the film was", "{}"), (swag, "i saw a film.", "it was {}")):
        (found,) = encoded(one, likelihood=False).examples
        expected = [tokenizer(first, second.format(text)) for text in TEXTS]
        assert found.input_ids == [number for each in expected for number in each["input_ids"]]
        assert found.more["token_type_ids"] == [number for each in expected for number in each["token_type_ids"]]
        assert found.more["sizes"] == [len(each["input_ids"]) for each in expected]
        assert found.labels == [2]


def test_a_language_model_is_given_what_goes_on() -> None:
    tokenizer = chat.tokenizer()
    one = row(question="what colour is the stone", choices=["red", "so blue", "what"])
    (found,) = encoded(one, likelihood=True).examples
    start = 0
    for text, size, scored in zip(found.more["choices"], found.more["sizes"], found.more["scored"], strict=True):
        ids = found.input_ids[start : start + size]
        assert tokenizer.decode(ids) == f"what colour is the stone {text}"
        assert tokenizer.decode(ids[-scored:]) == f" {text}"
        start += size


@pytest.mark.parametrize("likelihood", [True, False])
def test_what_is_too_long(likelihood: bool) -> None:
    one = row(question="the stone is red and the river is blue and it was")
    whole = encoded(one, likelihood=likelihood).examples[0]
    most = min(whole.more["sizes"]) - 2
    how: dict[str, Any] = {"likelihood": likelihood, "max_length": most}
    assert encoded(one, **how, truncate="drop").report.dropped == 1
    with pytest.raises(DataError, match=rf"a.jsonl:3 has \d+ tokens.* at most {most} are taken"):
        encoded(one, **how, truncate="fail")
    found = [encoded(one, **how, truncate=side) for side in ("end", "start")]
    assert [each.report.truncated for each in found] == [1, 1]
    assert all(max(each.examples[0].more["sizes"]) == most for each in found)
    if likelihood:
        tokenizer = chat.tokenizer()
        for each, begins in zip(found, (True, False), strict=True):
            (example,) = each.examples
            last = example.input_ids[-example.more["sizes"][-1] :]
            assert tokenizer.decode(last).startswith("the stone") == begins
            # The choice is never cut.
            assert tokenizer.decode(last).endswith(" not so fine")
        with pytest.raises(DataError, match="expected at least one of each"):
            encoded(one, likelihood=True, max_length=3)
