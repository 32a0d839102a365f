"""The batches of a run, with the rows that each comes from, in groups of one optimiser step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from veneer.data.batching import LengthBatches
from veneer.data.encode import Encoded
from veneer.train.prepare import Plan


def loader(plan: Plan) -> DataLoader[Any]:
    """Batches of tensors with ``origins``, the list of their rows; each pass has another order."""
    examples = plan.train_set.examples
    lengths = [len(example.input_ids) for example in examples]

    def collate(chosen: Sequence[Encoded]) -> dict[str, Any]:
        return {**plan.task.collate(chosen, plan.tokenizer), "origins": [example.origin for example in chosen]}

    batches = LengthBatches(lengths, plan.config.batch_size, seed=plan.config.seed)
    return DataLoader(list(examples), batch_sampler=batches, collate_fn=collate)


def groups(batches: Iterable[dict[str, Any]], accumulation: int) -> Iterator[list[dict[str, Any]]]:
    """The batches of one step after another, pass after pass, without end; a pass's last group may be smaller."""
    while True:
        left = iter(batches)
        while group := list(islice(left, accumulation)):
            yield group
