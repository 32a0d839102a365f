"""From rows to token ids and labels, with a count of everything that was cut or left out."""

from __future__ import annotations

import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from veneer.core.errors import DataError
from veneer.data.formats import Sample
from veneer.data.masking import Masked, masked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not trained; torch's cross entropy skips it."""


@dataclass(frozen=True)
class Encoded:
    """One training sequence of T tokens."""

    origin: str
    """The row it comes from."""
    input_ids: list[int]
    """(T,) token ids."""
    labels: list[int]
    """(T,) the same ids where trained, ``IGNORED`` elsewhere. The first is never trained: nothing predicts it."""

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows."""

    rows: int
    """Rows read."""
    examples: int
    """Sequences to train on."""
    truncated: int
    """Sequences cut at the longest length allowed."""
    tokens_cut: int
    """Tokens lost by that."""
    left_out: int
    """Sequences without a single trained token, which are not used."""
    tokens: int
    """Tokens of all sequences."""
    trained_tokens: int
    """Those that are trained."""
    longest: int
    """Tokens of the longest sequence."""

    def to_dict(self) -> dict[str, Any]:
        """The counts by name."""
        return asdict(self)


@dataclass(frozen=True)
class EncodedSet:
    """Sequences, and how they came about."""

    examples: tuple[Encoded, ...]
    report: EncodingReport

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and labels, in their order: equal for equal data, wherever it lies."""
        found = hashlib.sha256()
        for example in self.examples:
            found.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
        return found.hexdigest()[:32]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.input_ids) for example in self.examples]


def encode(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, *, max_length: int, completions_only: bool = True
) -> EncodedSet:
    """Tokenize, mask, and cut what is longer than ``max_length`` tokens at its end.

    Raises:
        DataError: not one token of the whole set would be trained, or a row that cannot be rendered.
    """
    examples: list[Encoded] = []
    truncated = tokens_cut = left_out = 0
    for sample in samples:
        for tokens in masked(sample, tokenizer, completions_only=completions_only):
            if len(tokens.input_ids) > max_length:
                truncated += 1
                tokens_cut += len(tokens.input_ids) - max_length
            example = _example(sample.origin, tokens, max_length)
            if example.trained:
                examples.append(example)
            else:
                left_out += 1
    if not examples:
        cut = f" {truncated} of them were cut at max_length={max_length}, before their answers." if truncated else ""
        raise DataError(
            f"None of the {len(samples)} rows has a token to train: all is masked.{cut} Expected answers (assistant "
            "turns, completions, outputs or text) within the longest length allowed."
        )
    report = EncodingReport(
        rows=len(samples),
        examples=len(examples),
        truncated=truncated,
        tokens_cut=tokens_cut,
        left_out=left_out,
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(example.trained for example in examples),
        longest=max(len(example.input_ids) for example in examples),
    )
    return EncodedSet(tuple(examples), report)


def _example(origin: str, tokens: Masked, max_length: int) -> Encoded:
    ids = tokens.input_ids[:max_length]
    flags = [False, *tokens.trained[1:max_length]]
    return Encoded(origin, ids, [token if flag else IGNORED for token, flag in zip(ids, flags, strict=False)])
