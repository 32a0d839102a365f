"""A source and what is to be written for it, as the tokens of an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.core.errors import DataError, listed
from veneer.data.encode import Encoded, EncodedSet, EncodingReport, Truncation
from veneer.data.rows import Row
from veneer.data.texts import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("source", "target", "prompt", "completion", "instruction", "input", "output")
_FORMS = (("source", "target"), ("prompt", "completion"), ("instruction", "output"))


def pair(row: Row, *, labelled: bool = True) -> tuple[str, str | None]:
    """A row's source and target, the target None where it may be missing and is.

    Raises:
        DataError: a row without its columns, or with something else than text in them.
    """
    for source, target in _FORMS:
        if source in row.values:
            text = text_of(row, source)
            if source == "instruction" and row.values.get("input"):
                text = f"{text}\n\n{text_of(row, 'input')}"
            wanted = labelled or row.values.get(target) is not None
            return text, text_of(row, target) if wanted else None
    raise DataError(
        f"{row.origin} has the columns {listed(map(str, row.values)) or 'none'}; expected source + target, prompt + "
        "completion, or instruction (+ input) + output."
    )


def encode_pairs(
    rows: Sequence[Row],
    pairs: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncate: Truncation,
) -> EncodedSet:
    """Sources as input ids and targets as labels, each at most ``max_length`` tokens.

    Raises:
        DataError: with "fail", one that is too long.
    """
    examples: list[Encoded] = []
    cut: list[int] = []
    dropped = 0
    for row, (source, target) in zip(rows, pairs, strict=True):
        ids, labels = list(tokenizer(source)["input_ids"]), list(tokenizer(text_target=target)["input_ids"])
        over = max(0, len(ids) - max_length) + max(0, len(labels) - max_length)
        if over and truncate == "fail":
            raise DataError(
                f"{row.origin} has {len(ids):,} tokens and {len(labels):,} to write, and at most {max_length:,} of "
                "each are taken; raise max_length, or let truncate be end, start or drop."
            )
        if over and truncate == "drop":
            dropped += 1
            continue
        if over:
            cut.append(over)
        examples.append(
            Encoded(row.origin, cut_target(ids, max_length, truncate), cut_target(labels, max_length, truncate))
        )
    lengths = [len(example.input_ids) + len(example.labels) for example in examples]
    report = EncodingReport(
        rows=len(rows),
        examples=len(examples),
        truncated=len(cut),
        tokens_cut=sum(cut),
        left_out=0,
        tokens=sum(lengths),
        trained_tokens=sum(len(example.labels) for example in examples),
        longest=max(lengths, default=0),
        dropped=dropped,
    )
    return EncodedSet(tuple(examples), report)


def cut_target(ids: list[int], most: int, truncate: Truncation) -> list[int]:
    """At most so many tokens, the last one kept: it is the end token, where there is one.

    With truncate "start" the first ones go, else those before the last.
    """
    if len(ids) <= most:
        return ids
    return ids[-most:] if truncate == "start" else [*ids[: most - 1], ids[-1]]
