"""Tasks whose predictions are written token by token: what is asked, and many answers at once.

Shape legend: B prompts, T tokens.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.data.encode import Encoded
from veneer.data.sources import Row
from veneer.tasks.judges import Judges, References, judged
from veneer.tasks.loading import log_errors_only
from veneer.tasks.sampling import Sampling
from veneer.tasks.task import AbstractTask, Goals, Prediction


class AbstractWriter(AbstractTask):
    """A task that answers by ``generate``."""

    @property
    @abstractmethod
    def judges(self) -> Judges:
        """What answers are judged by."""

    @abstractmethod
    def judged_by(self, judges: Judges) -> AbstractWriter:
        """The same task with other judges."""

    @abstractmethod
    def ask(self, rows: Sequence[Row], processor: Any, *, max_length: int) -> list[Encoded]:
        """Each row as a prompt: what comes before its answer, which need not be there.

        ``more`` has the text that is shown as the question under "asked", and under "reference" the answer that is
        right, or None.

        Raises:
            DataError: a row that is not of this task.
        """

    @abstractmethod
    def given(self, examples: Sequence[Encoded], processor: Any) -> dict[str, Tensor]:
        """Prompts as the inputs of ``generate``."""

    @abstractmethod
    def generation(self, processor: Any) -> dict[str, Any]:
        """Options of ``generate`` that the task needs."""

    @property
    def answer_goals(self) -> Goals:
        """The metrics of answers."""
        return self.judges.goals

    def judge(self, answers: Sequence[str], references: References) -> dict[str, float]:
        """The metrics of ``answer_goals``, of at least one answer; each has a text that is right, or several."""
        return judged(self.judges.names, answers, references, self.judges.database)

    def read(self, outputs: Any, examples: Sequence[Encoded], processor: Any) -> list[Prediction]:
        return []

    def details(self, predictions: Sequence[Prediction], examples: Sequence[Encoded]) -> dict[str, Any]:
        return {}


def question(example: Encoded) -> str:
    """What tells an asked example from others: those with equal ones ask the same thing."""
    given = {name: value for name, value in example.more.items() if name != "reference"}
    return json.dumps([example.input_ids, given], sort_keys=True)


_TEXT_ALONE = frozenset({"whisper"})
"""Types of models whose ``generate`` leaves out the tokens that begin and end a text."""


@dataclass(frozen=True)
class Written:
    """What a model wrote."""

    text: str
    """Without special tokens."""
    tokens: int
    """How many tokens, the end token included."""
    stopped: bool
    """Whether the model ended by itself, not at the limit."""


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends an answer: those of the generation config and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    known = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in (*known, tokenizer.eos_token_id) if i is not None})


def write(
    task: AbstractWriter,
    model: Any,
    examples: Sequence[Encoded],
    processor: Any,
    sampling: Sampling,
    *,
    batch_size: int,
    on_share: Callable[[float], object] = lambda share: None,
) -> list[Written]:
    """A model's answers to prompts, in their order; the model's mode and the random state are put back.

    Greedy answers do not depend on how prompts share a batch, but for rounding.

    Args:
        task: what the prompts are of.
        model: a transformers model that can generate, adapted or not.
        examples: what ``task.ask`` gave.
        processor: the tokenizer, or what has it.
        sampling: how tokens are chosen.
        batch_size: prompts that are answered together.
        on_share: told the share of the prompts that is done, after each batch.
    """
    order = sorted(range(len(examples)), key=lambda at: len(examples[at].input_ids))
    found: dict[int, Written] = {}
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(sampling.seed)
            for start in range(0, len(order), batch_size):
                group = order[start : start + batch_size]
                given = task.given([examples[at] for at in group], processor)
                options = task.generation(processor)
                found.update(zip(group, _answers(model, given, processor, sampling, options), strict=True))
                on_share(len(found) / len(order))
    finally:
        model.train(was_training)
    return [found[at] for at in range(len(examples))]


def choices(model: Any, tokenizer: Any, sampling: Sampling) -> dict[str, Any]:
    """The options of ``generate`` for a way of choosing tokens."""
    ends = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    if sampling.temperature:
        drawn: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    else:
        # The model's own sampling defaults would only raise warnings beside a greedy search.
        drawn = {"temperature": None, "top_p": None, "top_k": None}
    return {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": bool(sampling.temperature),
        "eos_token_id": ends or None,
        "pad_token_id": pad,
        **drawn,
    }


def _answers(
    model: Any, given: dict[str, Tensor], processor: Any, sampling: Sampling, more: dict[str, Any]
) -> list[Written]:
    tokenizer = getattr(processor, "tokenizer", processor)
    options = choices(model, tokenizer, sampling)
    placed = {key: tensor.to(model.device) for key, tensor in given.items()}
    if model.config.model_type in _TEXT_ALONE:
        # It takes one end token, no list, and warns of what it does itself.
        with log_errors_only():
            out = model.generate(**placed, **{**options, "eos_token_id": tokenizer.eos_token_id}, **more)
        return [_alone(row, options, tokenizer) for row in out.tolist()]
    out = model.generate(**placed, **options, **more)
    start = 0 if model.config.is_encoder_decoder else given["input_ids"].shape[1]
    found = []
    for row in out[:, start:].tolist():
        # A decoder's first token begins the answer, and may be one that ends others.
        first = 1 if model.config.is_encoder_decoder else 0
        end = next(
            (at for at, token in enumerate(row[first:], first) if token in (options["eos_token_id"] or ())), None
        )
        ids = row if end is None else row[: end + 1]
        found.append(Written(tokenizer.decode(ids, skip_special_tokens=True), len(ids) - first, end is not None))
    return found


def _alone(row: list[int], options: dict[str, Any], tokenizer: Any) -> Written:
    """A text that is padded behind its end, the end token left out."""
    fillers = {options["pad_token_id"], *(options["eos_token_id"] or ())}
    while row and row[-1] in fillers:
        row = row[:-1]
    stopped = len(row) < options["max_new_tokens"]
    return Written(tokenizer.decode(row, skip_special_tokens=True), len(row) + stopped, stopped)
