"""Sequences of different lengths in one batch: padding is told by the attention mask alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.data.encode import IGNORED, Encoded


def collate(examples: Sequence[Encoded], *, pad_id: int) -> dict[str, Tensor]:
    """B sequences, padded on the right to the longest, T tokens.

    Args:
        examples: at least one.
        pad_id: what to fill with. Any id of the vocabulary will do, eos too: no token is ever taken for padding
            because of its id.

    Returns:
        ``input_ids``, ``attention_mask`` (1 for tokens, 0 for padding) and ``labels``, each (B, T) int64.
    """
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

    return {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }
