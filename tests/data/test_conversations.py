"""ShareGPT's conversations, system prompts, tools, rows that are skipped, and what is too long."""

from __future__ import annotations

from typing import Any

import pytest

from tests import chat
from veneer.core.errors import DataError
from veneer.data.encode import IGNORED, EncodedSet, encode
from veneer.data.formats import recognise
from veneer.data.sources import read_rows, rows_of

SHAREGPT = {
    "system": "be short",
    "conversations": [
        {"from": "human", "value": "what colour is the stone"},
        {"from": "function_call", "value": "look"},
        {"from": "observation", "value": "red"},
        {"from": "gpt", "value": "the stone is red"},
    ],
}
TOOLS = (
    "{% if tools %}<|start|>tools\n{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def trained_text(tokenizer: Any, found: EncodedSet) -> str:
    (example,) = found.examples
    return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))


def test_sharegpt_is_a_conversation() -> None:
    (sample,) = recognise(rows_of([SHAREGPT]))
    assert [turn["role"] for turn in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    tokenizer = chat.tokenizer()
    found = encode([sample], tokenizer, max_length=500)
    # Every answer is trained, what a tool says is not.
    assert trained_text(tokenizer, found) == "look<|end|>the stone is red<|end|>"


def test_a_speaker_that_is_nobody() -> None:
    row = {"conversations": [{"from": "gtp", "value": "x"}]}
    with pytest.raises(DataError, match=r"turn 1 from 'gtp'; expected system, human.*Did you mean 'gpt'"):
        recognise(rows_of([row]))


def test_tools_and_calls_reach_the_template() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "stone"}}}
    row = {
        "tools": [{"type": "function", "function": {"name": "look"}}],
        "messages": [
            {"role": "user", "content": "what colour is the stone"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "red"},
            {"role": "assistant", "content": "red"},
        ],
    }
    tokenizer = chat.tokenizer(template=TOOLS)
    found = encode(recognise(rows_of([row])), tokenizer, max_length=900)
    text = tokenizer.decode(found.examples[0].input_ids)
    assert text.startswith('<|start|>tools\n[{"type": "function"')
    trained = trained_text(tokenizer, found)
    assert trained.endswith("red<|end|>")
    assert '"at": "stone"' in trained
    assert "tool\n" not in trained


@pytest.mark.parametrize("tools", ["no list", [1]])
def test_tools_that_are_none(tools: object) -> None:
    with pytest.raises(DataError, match="example 1 has tools = "):
        recognise(rows_of([{**SHAREGPT, "tools": tools}]))


def test_a_system_prompt_of_ones_own_stays() -> None:
    own = {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "system": "c"}
    (sample,) = recognise(rows_of([own]))
    assert [turn["content"] for turn in sample.messages] == ["a", "b"]
    (pair,) = recognise(rows_of([{"prompt": "p", "completion": "q", "system": "s"}]))
    assert (pair.kind, [turn["role"] for turn in pair.messages]) == ("chat", ["system", "user", "assistant"])


def test_a_list_in_a_json_file(tmp_path: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "one"}, {"text": "two"}]')
    assert [(row.origin, row.values["text"]) for row in read_rows(path)] == [
        ("rows.json:1", "one"),
        ("rows.json:2", "two"),
    ]
    for content, said in (('{"text": "one"}', "holds no list of objects"), ("[1", "is not JSON")):
        path.write_text(content)
        with pytest.raises(DataError, match=said):
            read_rows(path)
    path.write_text("[]")
    (tmp_path / "more.jsonl").write_text('{"text": "three"}\n')
    # In a folder, a .json says something about the data.
    assert [row.origin for row in read_rows(tmp_path)] == ["more.jsonl:1"]


ROWS = [{"text": "red green blue"}, {"text": "one two three four stone river cloud says"}]


@pytest.mark.parametrize(("truncate", "counts"), [("end", (2, 1, 0)), ("start", (2, 1, 0)), ("drop", (1, 0, 1))])
def test_what_is_too_long(truncate: Any, counts: tuple[int, int, int]) -> None:
    tokenizer = chat.tokenizer()
    whole = encode(recognise(rows_of(ROWS)), tokenizer, max_length=900)
    longest = whole.examples[1].input_ids
    most = len(longest) - 2
    found = encode(recognise(rows_of(ROWS)), tokenizer, max_length=most, truncate=truncate)
    report = found.report
    assert (report.examples, report.truncated, report.dropped) == counts
    if truncate != "drop":
        kept = found.examples[1]
        assert kept.input_ids == (longest[:most] if truncate == "end" else longest[2:])
        assert kept.labels == [IGNORED, *kept.input_ids[1:]]
        assert report.tokens_cut == 2


def test_too_long_can_be_an_error() -> None:
    with pytest.raises(DataError, match=r"example 2 has \d+ tokens, and at most 6 are taken; raise max_length"):
        encode(recognise(rows_of(ROWS)), chat.tokenizer(), max_length=6, truncate="fail")
