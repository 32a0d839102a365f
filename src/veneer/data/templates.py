"""The text that a conversation becomes: the tokenizer's own chat template, or a plain one that is saved with it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from veneer.core.errors import DataError
from veneer.data.formats import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
"""For conversations and instructions, when the tokenizer brings no template."""

VERBATIM_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""For prompts with completions, when the tokenizer brings no template: one follows the other as it is written."""


def with_template(
    tokenizer: PreTrainedTokenizerBase, kinds: Iterable[Kind]
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """A tokenizer that can render these kinds of samples, and what was done to it in one sentence, if anything.

    A tokenizer without a template is copied and gets a plain one. Saved beside the adapter, it makes every later
    use render the very same text.
    """
    if tokenizer.chat_template:
        return tokenizer, None
    found = set(kinds)
    if not found & {"chat", "pair"}:
        return tokenizer, None
    template = ROLES_TEMPLATE if "chat" in found else VERBATIM_TEMPLATE
    if template is ROLES_TEMPLATE and not tokenizer.eos_token:
        template = template.replace("{{ eos_token }}", "")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = _beginning(tokenizer) + template
    form = "headings for the roles" if "chat" in found else "prompt and completion as they are written"
    return tokenizer, f"The tokenizer has no chat template; a plain one ({form}) is used and saved with it."


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    origin: str = "The conversation",
) -> str:
    """The text of a conversation; with ``add_generation_prompt`` up to where the assistant begins to answer.

    To be tokenized with ``add_special_tokens=False``: a template writes its special tokens itself.

    Raises:
        DataError: the template refuses the conversation, or what it writes is not whole text.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        assert isinstance(text, str)
        text.encode("utf-8")
    except UnicodeEncodeError:
        # Of calls and tools the values are not looked at before.
        raise DataError(f"{origin} has half a character (a lone surrogate) in its text; expected whole text.") from None
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"{origin} does not fit the tokenizer's chat template: {reason}.") from None
    return text


def _beginning(tokenizer: PreTrainedTokenizerBase) -> str:
    """``{{ bos_token }}`` where the tokenizer puts one in front of plain text."""
    ids = tokenizer("a")["input_ids"]
    return "{{ bos_token }}" if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else ""
