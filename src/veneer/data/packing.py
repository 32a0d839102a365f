"""Sequences laid end to end in one row: nothing is padded, positions begin anew with each of them.

Shape legend: T tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.data.encode import Encoded


def pack(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """Several sequences as one row. Where positions begin anew, a sequence begins: transformers sees it so too.

    Args:
        examples: at least one.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each (1, T) int64. A first label is never supervised, so a
        loss that shifts the labels by one does not cross a border.
    """
    return {
        "input_ids": torch.tensor([[token for example in examples for token in example.input_ids]]),
        "position_ids": torch.cat([torch.arange(len(example.input_ids)) for example in examples])[None],
        "labels": torch.tensor([[label for example in examples for label in example.labels]]),
    }
