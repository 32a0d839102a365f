"""What a run does about memory: its optimiser, its precision, and what is computed twice, through the whole loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests import chat
from veneer.engine import precision
from veneer.train.config import OptimiserName, RunConfig
from veneer.train.loop import RunResult, train


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


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_auto_computes_in_what_was_measured(tmp_path: Path, faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(width: int, device: torch.device) -> precision.Speeds:
        asked.append((width, device.type))
        return precision.Speeds(64, {"fp32": 10.0, "bf16": 10.0, faster: 40.0})

    monkeypatch.setattr(precision, "measure", measured)
    auto = run(tmp_path / "auto", precision="auto")
    plain = run(tmp_path / "plain", precision=faster)
    assert asked == [(32, "cpu")]
    assert auto.record.notes[0].startswith(f"precision=auto is {faster}, by matmuls of 64 x 64: ")
    # Whoever goes on with this run finds the choice, not the question.
    assert RunConfig.read(tmp_path / "auto/run.yaml").precision == faster
    assert auto.record.train_loss == plain.record.train_loss
