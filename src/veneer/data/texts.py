"""Texts and pairs of texts as a tokenizer gives them to an encoder, with whatever is to be told of them as labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.errors import DataError, listed, nearest
from veneer.data.encode import Encoded, EncodedSet, EncodingReport, Truncation
from veneer.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_of(row: Row, column: str) -> str:
    """The text in a column.

    Raises:
        DataError: there is no such column, or no text in it.
    """
    value = row.values.get(column)
    if value is None:
        have = list(map(str, row.values))
        raise DataError(
            f"{row.origin} has no {column}; its columns are {listed(have) or 'none'}.{nearest(column, have, most=1)}"
        )
    if not isinstance(value, str):
        shown = repr(value)
        raise DataError(f"{row.origin} has {column} = {shown[:57]}{'...' * (len(shown) > 57)}; expected text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{row.origin} has half a character (a lone surrogate) in {column}; expected whole text."
        ) from None
    return value


def encode_texts(
    rows: Sequence[Row],
    texts: Sequence[tuple[Any, str | None]],
    tokenizer: PreTrainedTokenizerBase,
    told: Callable[[int, Any], tuple[Sequence[float], Mapping[str, Any]]],
    *,
    max_length: int,
    truncate: Truncation,
    **options: Any,
) -> EncodedSet:
    """Each text or pair as one sequence with the special tokens of its tokenizer.

    Args:
        rows: where they come from.
        texts: the text and what is compared with it, or None.
        tokenizer: the model's.
        told: from a row's number and its tokens to its labels and what else is to be known of it.
        max_length: the most tokens of a sequence, special tokens included.
        truncate: what becomes of a longer one; of a pair, the longer text is cut first.
        options: passed on to the tokenizer, as ``is_split_into_words``.

    Raises:
        DataError: with "fail", one that is too long.
    """
    examples: list[Encoded] = []
    cut: list[int] = []
    dropped = 0
    for number, (row, (text, pair)) in enumerate(zip(rows, texts, strict=True)):
        tokens = tokenizer(text, pair, **options)
        over = len(tokens["input_ids"]) - max_length
        if over > 0 and truncate == "fail":
            raise DataError(
                f"{row.origin} has {len(tokens['input_ids']):,} tokens, and at most {max_length:,} are taken; raise "
                "max_length, or let truncate be end, start or drop."
            )
        if over > 0 and truncate == "drop":
            dropped += 1
            continue
        if over > 0:
            cut.append(over)
            tokens = _cut(tokenizer, text, pair, max_length, "left" if truncate == "start" else "right", options)
        labels, more = told(number, tokens)
        kinds = {"token_type_ids": tokens["token_type_ids"]} if "token_type_ids" in tokens else {}
        examples.append(Encoded(row.origin, tokens["input_ids"], list(labels), {**kinds, **more}))
    return EncodedSet(tuple(examples), report(rows, examples, cut=cut, dropped=dropped))


def _cut(tokenizer: PreTrainedTokenizerBase, text: Any, pair: str | None, most: int, side: str, options: Any) -> Any:
    before, tokenizer.truncation_side = tokenizer.truncation_side, side
    try:
        return tokenizer(text, pair, truncation="longest_first", max_length=most, **options)
    finally:
        tokenizer.truncation_side = before


def report(rows: Sequence[Row], examples: Sequence[Encoded], *, cut: Sequence[int], dropped: int) -> EncodingReport:
    """The counts of a set in which every example has something to train."""
    lengths = [len(example.input_ids) for example in examples]
    return EncodingReport(
        rows=len(rows),
        examples=len(examples),
        truncated=len(cut),
        tokens_cut=sum(cut),
        left_out=0,
        tokens=sum(lengths),
        trained_tokens=sum(example.trained for example in examples),
        longest=max(lengths, default=0),
        dropped=dropped,
    )


def pad(examples: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and, where the tokenizer gives them, ``token_type_ids``, each (B, T) int64."""
    longest = max(len(example.input_ids) for example in examples)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (longest - len(values))]

    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batch = {
        "input_ids": torch.tensor([padded(example.input_ids, filler) for example in examples]),
        "attention_mask": torch.tensor([padded([1] * len(example.input_ids), 0) for example in examples]),
    }
    if "token_type_ids" in examples[0].more:
        kind = tokenizer.pad_token_type_id
        batch["token_type_ids"] = torch.tensor([padded(e.more["token_type_ids"], kind) for e in examples])
    return batch
