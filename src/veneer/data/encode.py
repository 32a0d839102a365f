"""From rows to token ids and labels, with a count of everything that was cut or left out."""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, final, overload

from veneer.core.errors import DataError
from veneer.data.formats import Sample
from veneer.data.masking import Masked, masked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["end", "start", "drop", "fail"]
"""What becomes of a sequence that is too long."""

IGNORED = -100
"""The label of a token that is not trained; torch's cross entropy skips it."""


@dataclass(frozen=True)
class Encoded:
    """One training example, of T tokens where it has any."""

    origin: str
    """The row it comes from."""
    input_ids: list[int]
    """(T,) token ids."""
    labels: list[Any]
    """What is to be learned. Of a language model, (T,) the same ids where trained, ``IGNORED`` elsewhere; the first is
    never trained: nothing predicts it. Of other tasks, what they say; empty where nothing is known."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else a task keeps of it, as JSON; a file stands under "file", its content's hash under "sha256"."""

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return len(self.labels) - self.labels.count(IGNORED)


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
    dropped: int = 0
    """Sequences left out for being longer than the longest length allowed."""

    def to_dict(self) -> dict[str, Any]:
        """The counts by name."""
        return asdict(self)


@dataclass(frozen=True)
class EncodedSet:
    """Sequences, and how they came about."""

    examples: Sequence[Encoded]
    report: EncodingReport
    sizes: Sequence[int] | None = None
    """Tokens of each example, where they are known without reading it."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and labels, in their order: equal for equal data, wherever it lies."""
        found = hashlib.sha256()
        for example in self.examples:
            found.update(array("q", [len(example.input_ids), *example.input_ids]).tobytes())
            whole = all(isinstance(label, int) for label in example.labels)
            found.update(array("q" if whole else "d", example.labels).tobytes())
            if example.more:
                content = {name: value for name, value in example.more.items() if name != "file"}
                found.update(json.dumps(content, sort_keys=True).encode())
        return found.hexdigest()[:32]

    @functools.cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example."""
        return self.sizes if self.sizes is not None else [len(example.input_ids) for example in self.examples]


def encode(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    completions_only: bool = True,
    truncate: Truncation = "end",
) -> EncodedSet:
    """Tokenize, mask, and deal with what is longer than ``max_length`` tokens: cut its end or start, drop it, or fail.

    A set without a single example is no error here; see ``check_trained``.

    Raises:
        DataError: a row that cannot be rendered, or with "fail" one that is too long.
    """
    examples: list[Encoded] = []
    truncated = tokens_cut = left_out = dropped = 0
    for sample in samples:
        for tokens in masked(sample, tokenizer, completions_only=completions_only):
            over = len(tokens.input_ids) - max_length
            if over > 0 and truncate == "fail":
                raise DataError(
                    f"{sample.origin} has {len(tokens.input_ids):,} tokens, and at most {max_length:,} are taken; "
                    "raise max_length where the model takes more, or let truncate be end, start or drop."
                )
            if over > 0 and truncate == "drop":
                dropped += 1
                continue
            if over > 0:
                truncated += 1
                tokens_cut += over
            example = _example(sample.origin, tokens, max_length, from_start=truncate == "start")
            if example.trained:
                examples.append(example)
            else:
                left_out += 1
    report = EncodingReport(
        rows=len(samples),
        examples=len(examples),
        truncated=truncated,
        tokens_cut=tokens_cut,
        left_out=left_out,
        tokens=sum(len(example.input_ids) for example in examples),
        trained_tokens=sum(example.trained for example in examples),
        longest=max((len(example.input_ids) for example in examples), default=0),
        dropped=dropped,
    )
    return EncodedSet(tuple(examples), report)


def check_trained(report: EncodingReport, max_length: int) -> None:
    """Refuse a set without a single token to train.

    Args:
        report: of the set.
        max_length: the longest length that was allowed.

    Raises:
        DataError: there is none; the message says what became of the rows.
    """
    if report.examples:
        return
    cut = f" {report.truncated} of them were cut at max_length={max_length}, before their answers."
    dropped = f" {report.dropped} of them were dropped as longer than max_length={max_length}."
    raise DataError(
        f"None of the {report.rows} rows has a token to train: all is masked.{cut if report.truncated else ''}"
        f"{dropped if report.dropped else ''} Expected answers (assistant turns, completions, outputs or text) within "
        "the longest length allowed."
    )


def joined(sets: Sequence[EncodedSet]) -> EncodedSet:
    """Several sets, one behind the other."""
    if len(sets) == 1:
        return sets[0]
    counts = {
        field.name: (max if field.name == "longest" else sum)(getattr(one.report, field.name) for one in sets)
        for field in fields(EncodingReport)
    }
    sizes = array("q", (length for one in sets for length in one.lengths))
    return EncodedSet(Joined([one.examples for one in sets]), EncodingReport(**counts), sizes)


@final
class Joined(Sequence[Encoded]):
    """The examples of several sets, one behind the other."""

    def __init__(self, parts: Sequence[Sequence[Encoded]]) -> None:
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    @overload
    def __getitem__(self, at: int) -> Encoded: ...

    @overload
    def __getitem__(self, at: slice) -> list[Encoded]: ...

    def __getitem__(self, at: int | slice) -> Encoded | list[Encoded]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        index = range(len(self))[at]
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


def _example(origin: str, tokens: Masked, max_length: int, *, from_start: bool) -> Encoded:
    first = max(0, len(tokens.input_ids) - max_length) if from_start else 0
    ids, trained = tokens.input_ids[first:][:max_length], tokens.trained[first:][:max_length]
    # Nothing stands before the first token that could predict it.
    flags = [False, *trained[1:]]
    return Encoded(origin, ids, [token if flag else IGNORED for token, flag in zip(ids, flags, strict=True)])
