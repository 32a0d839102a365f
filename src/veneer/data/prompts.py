"""What a model is given to go on from: a sample without its answer, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from veneer.data.formats import Sample
from veneer.data.templates import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """The tokens of a prompt, up to where the answer begins, and the text to show for it: its last message.

    Raises:
        DataError: the template refuses the conversation.
    """
    if sample.kind == "text":
        return list(tokenizer(sample.text, verbose=False)["input_ids"]), sample.text
    text = render(tokenizer, sample.messages, add_generation_prompt=True, tools=sample.tools, origin=sample.origin)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids), str(sample.messages[-1]["content"]) if sample.messages else ""


def pad_left(prompts: Sequence[Sequence[int]], fill: int) -> dict[str, Tensor]:
    """B prompts as ``input_ids`` and ``attention_mask``, each (B, T) int64, filled up in front."""
    longest = max(map(len, prompts))
    ids = [[*[fill] * (longest - len(each)), *each] for each in prompts]
    mask = [[*[0] * (longest - len(each)), *[1] * len(each)] for each in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
