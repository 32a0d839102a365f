from __future__ import annotations

import pytest

from veneer.core.errors import DataError
from veneer.data.formats import kinds, recognise
from veneer.data.sources import Row, rows_of


def one(values: dict) -> object:
    return recognise([Row("f.jsonl:7", values)])[0]


def test_each_set_of_columns_is_recognised() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert list(one({"messages": chat}).messages) == chat
    assert one({"messages": chat}).kind == "chat"
    pair = one({"prompt": "p ", "completion": " c", "id": 3})
    assert (pair.kind, [m["content"] for m in pair.messages]) == ("pair", ["p ", " c"])
    assert [m["role"] for m in pair.messages] == ["user", "assistant"]
    instruction = one({"instruction": "do", "input": "this", "output": "done"})
    assert [m["content"] for m in instruction.messages] == ["do\n\nthis", "done"]
    for absent in ({}, {"input": ""}, {"input": None}):
        assert one({"instruction": "do", "output": "done", **absent}).messages[0]["content"] == "do"
    assert one({"text": "t"}).text == "t"
    assert one({"text": "t"}).kind == "text"


def test_messages_may_be_json_in_a_cell_and_lose_empty_fields() -> None:
    assert one({"messages": '[{"role": "user", "content": "u", "tool": null}]'}).messages == (
        {"role": "user", "content": "u"},
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"promt": "a", "completion": "b"}, r"columns promt, completion; expected messages, .*Did you mean 'prompt'"),
        ({}, "has the columns none; expected"),
        ({"prompt": "a"}, "has the columns prompt; expected messages"),
        ({"prompt": 3, "completion": "b"}, "has prompt = 3; expected text"),
        ({"prompt": "a", "completion": None}, "has completion = None; expected text"),
        ({"text": "\ud800"}, "half a character .* in text"),
        ({"prompt": "a", "completion": ""}, "has an empty completion; expected text to learn"),
        ({"instruction": "a", "output": " \n"}, "has an empty output"),
        ({"text": ""}, "has an empty text"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "has an empty answer as message 1"),
        ({"conversations": [{"from": "gpt", "value": ""}]}, "has an empty answer as message 1"),
        ({"messages": []}, r"has messages = \[\]; expected a list of turns"),
        ({"messages": "hello"}, "expected a JSON list"),
        ({"messages": [{"role": "user"}]}, "as message 1; expected role and content"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, "has 'b' as message 2; expected role and content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "content of message 1 = .*; expected text"),
    ],
)
def test_a_row_without_its_columns_is_named(values: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        one(values)
    assert str(caught.value).startswith("f.jsonl:7 has ")


@pytest.mark.parametrize("more", [{"tool_calls": [{"function": {"name": "look"}}]}, {"reasoning_content": "hm"}])
def test_an_answer_may_stand_in_another_key(more: dict) -> None:
    assert one({"messages": [{"role": "assistant", "content": "", **more}]}).messages[0]["content"] == ""


def test_kinds_pass_over_what_is_not_understood() -> None:
    rows = rows_of(
        [{"text": "a"}, {"txet": "b"}, {"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"}]
    )
    assert list(kinds(rows)) == ["text", "pair"]
