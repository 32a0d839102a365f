"""Sequences in one batch: end to end where the model can keep them apart, else padded as the attention mask tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.data.encode import IGNORED, Encoded
from veneer.data.packing import pack


def collate(examples: Sequence[Encoded], *, pad_id: int, packed: bool = False) -> dict[str, Tensor]:
    """B sequences as one batch of T tokens a row.

    Args:
        examples: at least one.
        pad_id: what to fill with. Any id of the vocabulary will do, eos too: no token is ever taken for padding
            because of its id.
        packed: lay them end to end (see ``pack``), unless they are of one length and need no padding.

    Returns:
        ``input_ids`` and ``labels``, each (B, T) int64, with ``attention_mask`` (1 for tokens, 0 for padding on the
        right); of a packed batch, what ``pack`` gives, or rows of one length without a mask.
    """
    longest = max(len(example.input_ids) for example in examples)
    even = all(len(example.input_ids) == longest for example in examples)
    if packed and not even:
        return pack(examples)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

    batch = {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "labels": padded([example.labels for example in examples], IGNORED),
    }
    if not packed:
        batch["attention_mask"] = padded([[1] * len(example.input_ids) for example in examples], 0)
    return batch


def tokens(batch: Mapping[str, Tensor]) -> int:
    """How many tokens a batch has, padding left out: those read, else those written, else one for each example."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    ids = batch.get("input_ids")
    if ids is not None:
        return int(ids.numel())
    labels = batch.get("labels")
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        return int((labels != IGNORED).sum())
    return len(next(iter(batch.values())))
