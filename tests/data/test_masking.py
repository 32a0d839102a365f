from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import chat
from veneer.core.errors import DataError
from veneer.data.formats import Sample
from veneer.data.masking import Masked, masked
from veneer.data.templates import with_template

# Turns end in a token that is not the tokenizer's eos.
OTHER_END = chat.CHAT_TEMPLATE.replace("<|end|>", "<|stop|>")
# One header for the question, none for the answer; eos behind each answer.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# No sign of where anything ends.
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Earlier answers are shortened as soon as another follows, as reasoning models do.
REWRITING = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('=>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

TOKENIZER = chat.tokenizer()
# Special tokens in a text would be read as what they say; anything else must come back unchanged.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=20)


def sample(*turns: tuple[str, str], kind: str = "chat") -> Sample:
    return Sample("f:1", kind, tuple({"role": role, "content": content} for role, content in turns))


def tokens(given: Sample, tokenizer: Any = TOKENIZER, **options: Any) -> list[Masked]:
    return masked(given, tokenizer, **{"completions_only": True, **options})


def trained_text(result: Masked, tokenizer: Any = TOKENIZER) -> str:
    return tokenizer.decode([t for t, flag in zip(result.input_ids, result.trained, strict=True) if flag])


@given(TEXT, TEXT)
def test_the_trained_tokens_are_the_completion_and_its_end(prompt: str, completion: str) -> None:
    (result,) = tokens(sample(("user", prompt), ("assistant", completion)))
    assert trained_text(result) == completion + "<|end|>"
    assert TOKENIZER.decode(result.input_ids) == (
        f"<|start|>user\n{prompt}<|end|>\n<|start|>assistant\n{completion}<|end|>"
    )


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.booleans())
def test_every_assistant_turn_is_trained(turns: list[tuple[str, str]], trailing_question: bool) -> None:
    flat = [turn for q, a in turns for turn in (("user", q), ("assistant", a))]
    (result,) = tokens(sample(*flat, *([("user", "more")] if trailing_question else [])))
    assert trained_text(result) == "".join(answer + "<|end|>" for _, answer in turns)


@given(TEXT, TEXT)
def test_what_stands_before_an_answer_is_tokenized_as_when_it_is_asked_for(prompt: str, completion: str) -> None:
    tokenizer, _ = with_template(chat_free, ["pair"])
    (result,) = tokens(sample(("user", prompt), ("assistant", completion), kind="pair"), tokenizer)
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert result.input_ids[: len(asked)] == asked
    assert result.trained == [False] * len(asked) + [True] * (len(result.trained) - len(asked))
    assert trained_text(result) == completion + "<|end|>"


chat_free = chat.tokenizer(template=None)


def test_a_border_inside_a_joint_token_is_kept() -> None:
    tokenizer, _ = with_template(chat_free, ["pair"])
    joint = tokenizer("the stone", add_special_tokens=False)["input_ids"]
    (result,) = tokens(sample(("user", "the sto"), ("assistant", "ne"), kind="pair"), tokenizer)
    assert result.input_ids[:-1] != joint
    assert trained_text(result) == "ne<|end|>"


def test_roles_get_plain_headings_without_a_template() -> None:
    tokenizer, note = with_template(chat_free, ["chat", "pair"])
    assert "no chat template" in note
    assert chat_free.chat_template is None
    (result,) = tokens(sample(("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")), tokenizer)
    assert trained_text(result) == "a<|end|>b<|end|>"
    assert tokenizer.decode(result.input_ids) == (
        "### User:\nu\n\n### Assistant:\na<|end|>\n\n### User:\nv\n\n### Assistant:\nb<|end|>"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (BRACKETS, " a<|end|> b<|end|>"),
        (OTHER_END, "a<|stop|>\nb<|stop|>\n<|end|>"),
        (BARE, "a\nb\n<|end|>"),
    ],
)
def test_other_templates(template: str, expected: str) -> None:
    tokenizer = chat.tokenizer(template=template)
    (result,) = tokens(sample(("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")), tokenizer)
    assert trained_text(result, tokenizer) == expected


def test_answers_that_are_rewritten_later_are_trained_as_they_were_asked_for() -> None:
    tokenizer = chat.tokenizer(template=REWRITING)
    turns = [("user", "u"), ("assistant", "think=>a"), ("user", "v"), ("assistant", "more=>b")]
    first, second = tokens(sample(*turns), tokenizer)
    assert trained_text(first, tokenizer) == "think=>a<|end|>"
    assert trained_text(second, tokenizer) == "more=>b<|end|>"
    assert tokenizer.decode(second.input_ids).startswith(
        "<|start|>user\nu<|end|>\n<|start|>assistant\na<|end|>\n<|start|>user\nv"
    )


def test_a_template_without_any_growth_is_refused() -> None:
    tokenizer = chat.tokenizer(template="{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match=r"f:1 cannot be masked: .*train_on=all"):
        tokens(sample(("user", "u"), ("assistant", "a")), tokenizer)


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    tokenizer = chat.tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"f:1 does not fit the tokenizer's chat template: roles must alternate"):
        tokens(sample(("user", "u"), ("assistant", "a")), tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // (messages | length - 2) }}",
        "{{ messages[0]['content'].index('?') }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ messages[7]['role'].upper() }}",
        "{{ namespace(**messages[0]['content']) }}",
    ],
)
def test_whatever_a_template_fails_with_is_a_bad_row(template: str) -> None:
    with pytest.raises(DataError, match=r"f:1 does not fit the tokenizer's chat template: [^\n]*\.$"):
        tokens(sample(("user", "u"), ("assistant", "a")), chat.tokenizer(template=template))


def test_half_a_character_in_a_tool_is_a_bad_row() -> None:
    tokenizer = chat.tokenizer(template="{{ tools[0]['name'] }}" + chat.CHAT_TEMPLATE)
    turns = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"})
    with pytest.raises(DataError, match=r"f:1 has half a character \(a lone surrogate\) in its text"):
        tokens(Sample("f:1", "chat", turns, tools=({"name": "\ud800"},)), tokenizer)


def test_nothing_is_trained_without_an_answer() -> None:
    (result,) = tokens(sample(("user", "u")))
    assert True not in result.trained


@given(TEXT)
def test_plain_text_is_trained_whole_and_ends(text: str) -> None:
    (result,) = tokens(Sample("f:1", "text", text=text))
    assert result.input_ids == [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] or not text
    assert all(result.trained)


def test_train_on_all_takes_the_whole_conversation() -> None:
    (result,) = tokens(sample(("user", "u"), ("assistant", "a")), completions_only=False)
    assert trained_text(result) == "<|start|>user\nu<|end|>\n<|start|>assistant\na<|end|>"


def test_a_plain_template_begins_as_the_tokenizer_does() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat.tokenizer(template=None)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    assert "bos_token" not in with_template(tokenizer, ["chat"])[0].chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    assert with_template(tokenizer, ["chat"])[0].chat_template.startswith("{{ bos_token }}")


def test_a_tokenizer_without_eos_adds_none() -> None:
    tokenizer = chat.tokenizer(pad=None)
    tokenizer.eos_token = None
    (result,) = tokens(Sample("f:1", "text", text="stone"), tokenizer)
    assert result.input_ids == tokenizer("stone")["input_ids"]
    given, _ = with_template(chat.tokenizer(template=None), ["chat"])
    assert "eos_token" in given.chat_template
    bare = chat.tokenizer(template=None, pad=None)
    bare.eos_token = None
    assert "eos_token" not in with_template(bare, ["chat"])[0].chat_template
