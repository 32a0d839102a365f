from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from veneer.core.errors import UsageError
from veneer.report.plots import loss_plot, read_curve, smoothed


def log(folder: Path, *events: dict) -> Path:
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


START = {"event": "start", "model": "/models/small", "method": "lora"}
STEPS = [{"event": "step", "step": step, "loss": 3 / math.sqrt(step)} for step in range(1, 60)]
EVALS = [{"event": "eval", "step": step, "loss": 3 - step / 30} for step in (0, 30, 59)]


def test_the_curve_is_what_the_log_says(tmp_path: Path) -> None:
    curve = read_curve(log(tmp_path, START, EVALS[0], *STEPS, *EVALS[1:], {"event": "step", "step": 60, "loss": None}))
    assert curve.title == "small, lora"
    assert curve.steps == tuple(range(1, 60))
    assert curve.losses == tuple(step["loss"] for step in STEPS)
    assert curve.held_out_steps == (0, 30, 59)


@pytest.mark.parametrize("events", [[START, *EVALS, *STEPS], [START, *STEPS[:1]], [EVALS[0]], []])
def test_a_picture_is_drawn(tmp_path: Path, events: list[dict]) -> None:
    path = loss_plot(log(tmp_path, *events))
    with Image.open(path) as picture:
        assert picture.size == (1200, 675)
    assert {file.name for file in tmp_path.iterdir()} == {"log.jsonl", "loss.png"}


def test_how_the_run_went_stands_below(tmp_path: Path) -> None:
    more = [{**step, "learning_rate": 1e-4, "gradient_norm": None if step["step"] == 3 else 1.0} for step in STEPS]
    curve = read_curve(log(tmp_path, START, *more))
    assert list(curve.others) == ["learning rate", "gradient norm"]
    assert curve.others["learning rate"] == (1e-4,) * 59
    assert math.isnan(curve.others["gradient norm"][2])
    with Image.open(loss_plot(tmp_path)) as picture:
        assert picture.size == (1200, 930)


def test_smoothing() -> None:
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smoothed([5.0])[0] == 5.0
    noisy = smoothed([0.0, 1.0] * 50)
    assert 0.2 < min(noisy[20:]) < max(noisy[20:]) < 0.8


def test_a_folder_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no log\.jsonl; expected a run folder"):
        loss_plot(tmp_path)
    (tmp_path / "log.jsonl").write_text("{}x\n")
    with pytest.raises(UsageError, match=r"log\.jsonl:1 is not a line of JSON"):
        loss_plot(tmp_path)
