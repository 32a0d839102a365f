"""The figures of tokens that are written; of encoder-decoders the targets, the decoder's input and the loss.

Shape legend: B examples, T tokens of a target, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.core.errors import DataError
from veneer.data.encode import IGNORED, Encoded
from veneer.data.rows import Row
from veneer.tasks.task import BatchLoss, Goals, Tally

GOALS: Goals = {"loss": "min", "perplexity": "min", "token_accuracy": "max"}

_EXP_LIMIT = 700.0  # exp() of more does not fit a float


def targets(examples: Sequence[Encoded]) -> Tensor:
    """(B, T) int64, ``IGNORED`` behind each target's end."""
    longest = max(len(example.labels) for example in examples)
    return torch.tensor([[*example.labels, *[IGNORED] * (longest - len(example.labels))] for example in examples])


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """(B, T) what the decoder reads to write ``labels``: these, shifted by its start token."""
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        found: Tensor = own(labels=labels)
        return found
    config: Any = model.config
    shifted = labels.roll(1, -1).masked_fill(labels.roll(1, -1) == IGNORED, config.pad_token_id)
    shifted[:, 0] = config.decoder_start_token_id
    return shifted


def loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> BatchLoss:
    """The summed loss of the tokens of B targets."""
    bare = getattr(model, "module", model)
    logits = model(**inputs, decoder_input_ids=decoder_inputs(bare, labels), use_cache=False).logits.float()
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    seen = labels != IGNORED
    right = int(((logits.argmax(-1) == labels) & seen).sum())
    return BatchLoss(total, Tally(float(total.detach()), int(seen.sum()), right))


def asked(
    rows: Sequence[Row], pairs: Sequence[tuple[str, str | None]], tokenizer: Any, prefix: str, max_length: int
) -> list[Encoded]:
    """Sources as prompts, with the targets to compare answers with.

    Raises:
        DataError: a source that is longer than the model takes.
    """
    found = []
    for row, (source, target) in zip(rows, pairs, strict=True):
        ids = list(tokenizer(f"{prefix}{source}")["input_ids"])
        if len(ids) > max_length:
            raise DataError(f"{row.origin} has {len(ids):,} tokens to read, and at most {max_length:,} are taken.")
        found.append(Encoded(row.origin, ids, [], {"asked": source, "reference": target}))
    return found


def metrics(tally: Tally) -> dict[str, float]:
    """Those of ``GOALS``."""
    mean = tally.loss / tally.units if tally.units else math.nan
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < _EXP_LIMIT else math.inf,
        "token_accuracy": tally.correct / tally.units if tally.units else math.nan,
    }
