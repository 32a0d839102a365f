"""What becomes of one row: sequences, or the reason why it is a bad one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from veneer.core.errors import DataError
from veneer.data.columns import renamed
from veneer.data.encode import EncodedSet
from veneer.data.rows import BadRow, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class Encoder:
    """Encodes rows one by one, so that each failure has its row. It can be sent to other processes."""

    encode: Callable[[Sequence[Row]], EncodedSet]
    """A task's way from rows to sequences."""
    tokenizer: PreTrainedTokenizerBase
    """What it uses."""
    columns: Mapping[str, str]
    """From the names of columns that are understood to those that the data has."""
    vocabulary: int | None = None
    """How many tokens the model has embeddings for; None checks nothing."""

    def __call__(self, row: Row | BadRow) -> tuple[Row, EncodedSet] | BadRow:
        """The row with its sequences, or what is wrong with it: columns, values, template, length, vocabulary."""
        if isinstance(row, BadRow):
            return row
        try:
            found = self.encode([renamed(row, self.columns) if self.columns else row])
            self._check_vocabulary(row, found)
        except DataError as error:
            return BadRow(str(error))
        return row, found

    def _check_vocabulary(self, row: Row, found: EncodedSet) -> None:
        if self.vocabulary is None:
            return
        for example in found.examples:
            most = max(example.input_ids, default=0)
            if most >= self.vocabulary:
                token = self.tokenizer.convert_ids_to_tokens(most)
                raise DataError(
                    f"{row.origin} has the token {most} ({token!r}), outside of the model's vocabulary of "
                    f"{self.vocabulary:,}; use the model's own tokenizer, or a model with an embedding for each token."
                )
