"""What a run does about memory: its optimiser, its precision, and what is computed twice, through the whole loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from tests import chat
from veneer.train.config import RunConfig
from veneer.train.loop import RunResult, train
from veneer.train.optimisers import OptimiserName


def run(folder: Path, *, model: Any = None, **settings: Any) -> RunResult:
    config = {"batch_size": 4, "learning_rate": 5e-3, "max_steps": 3, "schedule": "constant", "warmup": 0, **settings}
    return train(
        RunConfig(output=str(folder), target_modules="all-linear", **config),
        model=chat.model() if model is None else model,
        tokenizer=chat.tokenizer(),
        train_rows=chat.pairs(12),
    )


@pytest.mark.parametrize("name", get_args(OptimiserName))
def test_every_optimiser_runs_and_learns(tmp_path: Path, name: str) -> None:
    rate = 1.0 if name == "sgd" else 5e-3
    record = run(tmp_path / "run", optimizer=name, learning_rate=rate, max_steps=9).record
    assert record.held_out_after["loss"] < record.held_out_before["loss"]
    assert any("pages nothing on a CPU" in note for note in record.notes) == name.startswith("paged_")
