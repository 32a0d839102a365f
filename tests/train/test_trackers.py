"""The trackers: TensorBoard's own files read back, the others through a package that notes what it is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import chat
from veneer.core.errors import ConfigError, TrainingError, UsageError
from veneer.tasks.causal_lm import Task
from veneer.train.config import TRACKERS, RunConfig
from veneer.train.loop import train
from veneer.train.trackers import Trackers

FAKE = """
import json, os, pathlib

NOTES = pathlib.Path(__file__).with_name("notes.jsonl")


class _Config:
    def update(self, values, **_):
        note("config", values)


class _Run:
    config = _Config()

    def log(self, values, step=None, **_):
        if os.environ.get("FAKE_FAILS"):
            raise ConnectionError("no route to host.")
        note("log", {**values, "at": step})

    def finish(self):
        note("finish", {})


config = _Config()


def note(what, values):
    with NOTES.open("a") as stream:
        stream.write(json.dumps([what, values]) + chr(10))


def init(**settings):
    if os.environ.get("FAKE_REFUSES"):
        raise RuntimeError("no login.")
    note("init", {**settings, "mode": os.environ.get("WANDB_MODE")})
    return _Run()
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name; returns the file that it notes its calls in."""
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    # What a tracker is told about the network stays within the test.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return tmp_path / "packages" / "wandb" / "notes.jsonl"


def run(folder: Path, track: str, **settings: object) -> None:
    config = RunConfig(
        output=str(folder), track=track, batch_size=4, max_steps=2, target_modules=["q_proj"], **settings
    )
    train(config, model=chat.model(), tokenizer=chat.tokenizer(), train_rows=chat.pairs(12))


def logged(folder: Path, event: str, name: str) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["step"], line[name]) for line in lines if line["event"] == event]


def test_tensorboard_reads_the_curves_of_the_log(tmp_path: Path) -> None:
    run(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for tag, event, name in (
        ("train/loss", "step", "loss"),
        ("train/learning_rate", "step", "learning_rate"),
        ("train/gradient_norm", "step", "gradient_norm"),
        ("eval/loss", "eval", "loss"),
    ):
        shown = [(scalar.step, scalar.value) for scalar in events.Scalars(tag)]
        assert shown == [(step, pytest.approx(value)) for step, value in logged(tmp_path / "run", event, name)]


def test_another_tracker_gets_config_curves_and_its_end(tmp_path: Path, wandb: Path) -> None:
    run(tmp_path / "run", "wandb")
    notes = [json.loads(line) for line in wandb.read_text().splitlines()]
    identity = (tmp_path / "run" / "wandb-id.txt").read_text()
    begun = {"project": "veneer", "name": "run", "mode": "offline", "id": identity, "resume": "allow"}
    assert notes[0] == ["init", begun]
    assert notes[1][0] == "config"
    assert notes[1][1]["max_steps"] == 2
    curves = [(values["at"], values["train/loss"]) for what, values in notes if "train/loss" in values]
    assert curves == logged(tmp_path / "run", "step", "loss")
    assert [what for what, _ in notes].count("finish") == 1
    assert notes[-1][0] == "finish"


def test_a_run_that_goes_on_is_the_same_one(tmp_path: Path, wandb: Path) -> None:
    run(tmp_path / "run", "wandb")
    folder = tmp_path / "run"
    Trackers(RunConfig(output=str(folder), track="wandb")).finish()
    begun = [values for what, values in map(json.loads, wandb.read_text().splitlines()) if what == "init"]
    assert begun[0] == begun[1]
    assert begun[0]["id"] == (folder / "wandb-id.txt").read_text()


@pytest.mark.parametrize("error", [TrainingError, KeyboardInterrupt])
def test_a_run_that_breaks_off_still_ends_at_the_tracker(
    tmp_path: Path, wandb: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def breaking(*_: object) -> None:
        raise error

    monkeypatch.setattr(Task, "loss", breaking)
    with pytest.raises(error):
        run(tmp_path / "run", "tensorboard,wandb", eval_fraction=0)
    assert wandb.read_text().splitlines()[-1] == '["finish", {}]'
    assert (tmp_path / "run").exists() == (error is TrainingError)


def test_a_tracker_that_fails_on_the_way_does_not_end_the_run(
    tmp_path: Path, wandb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAILS", "1")
    with pytest.warns(
        UserWarning, match=r"^The tracker wandb failed and is left out from here on: no route to host\.$"
    ):
        run(tmp_path / "run", "wandb")
    assert (tmp_path / "run" / "result.json").is_file()


def test_a_tracker_that_does_not_start_leaves_nothing(
    tmp_path: Path, wandb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_REFUSES", "1")
    with pytest.raises(TrainingError, match=r"^The tracker wandb could not be started: no login\.$"):
        run(tmp_path / "run", "tensorboard,wandb")
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"track=comet_ml needs a package that is not here: pip install comet-ml\."):
        run(tmp_path / "run", "comet_ml")
    assert not (tmp_path / "run").exists()


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"track has no 'tensorbord'; .* Did you mean 'tensorboard'\?"):
        RunConfig(output="x", track="wandb, tensorbord")


def test_the_names_are_accelerates() -> None:
    assert TRACKERS.keys() == LOGGER_TYPE_TO_CLASS.keys()
    assert RunConfig(output="x", track=" wandb,aim,wandb").trackers() == ["wandb", "aim"]
