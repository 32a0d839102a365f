"""A run that was stopped, by whatever, goes on as if it had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import chat
from veneer.core.errors import ConfigError, DiskError, TrainingError, UsageError
from veneer.train import learner, state
from veneer.train.config import RunConfig
from veneer.train.loop import RunResult, train
from veneer.train.resume import FREE, resumed

SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "max_steps": 8,
    "eval_every": 2,
    "learning_rate": 5e-3,
    "target_modules": "all-linear",
    "lora_dropout": 0.1,
}
WHOLE = {"target_modules", "lora_dropout"}


def given(**others: Any) -> dict[str, Any]:
    return {"model": chat.model(), "tokenizer": chat.tokenizer(), "train_rows": chat.pairs(20), **others}


def begin(folder: Path, **settings: Any) -> RunResult:
    values = {**SETTINGS, **settings}
    if values.get("method", "lora") != "lora":
        values = {name: value for name, value in values.items() if name not in WHOLE}
    return train(RunConfig(output=str(folder), **values), **given())


def go_on(folder: Path, *, data: dict[str, Any] | None = None, **overrides: Any) -> RunResult:
    return train(resumed(folder, **overrides), resume=True, **(data or given()))


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, how: int = signal.SIGINT) -> None:
    """Send a signal in the middle of a step."""
    take = learner.Learner.take

    def stopping(self: Any, group: Any, step: int, *args: Any) -> Any:
        if step == steps:
            os.kill(os.getpid(), how)
        return take(self, group, step, *args)

    monkeypatch.setattr(learner.Learner, "take", stopping)


def tensors(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    (file,) = (folder / name).glob("*model.safetensors")
    return load_file(file)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def same_end(one: Path, other: Path) -> None:
    for name in ("last", "best"):
        ours, theirs = tensors(one, name), tensors(other, name)
        assert ours.keys() == theirs.keys()
        assert not [key for key in ours if not torch.equal(ours[key], theirs[key])]
    for kind, keys in {"step": ("step", "loss", "gradient_norm", "learning_rate"), "eval": ("step", "loss")}.items():
        ours, theirs = ([[e[k] for k in keys] for e in events(folder, kind)] for folder in (one, other))
        assert ours == theirs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": "off", "accumulation": 2},
        {"use_dora": True},
        {"family": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "lora_dropout": 0.0},
        {"family": "vera", "r": 8, "lora_dropout": 0.0},
        {"method": "full", "learning_rate": 1e-3},
        {"method": "head"},
        {"optimizer": "adamw_8bit"},
        {"schedule": "linear", "loraplus_lr_ratio": 4.0},
    ],
    ids=str,
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        stopped = begin(tmp_path / "run", **settings)
    assert stopped.record.interrupted
    assert (stopped.record.steps, stopped.signal) == (3, signal.SIGINT)
    torch.manual_seed(99)
    result = go_on(tmp_path / "run")
    assert (result.record.steps, result.record.interrupted) == (8, False)
    same_end(tmp_path / "run", tmp_path / "whole")
    (again,) = events(tmp_path / "run", "resume")
    assert again["step"] == 3


def test_kill_9_at_any_moment_loses_nothing() -> None:
    script = Path(__file__).with_name("kill_many.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "4", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "every run came back to the same weights" in done.stdout


def test_a_run_that_was_killed_as_it_began_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.run.yaml.1234.tmp").write_text("output:")
    begin(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


def test_sigterm_saves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop_after(monkeypatch, 2, signal.SIGTERM)
    result = begin(tmp_path / "run")
    assert (result.record.steps, result.signal) == (2, signal.SIGTERM)
    assert (tmp_path / "run/last").is_dir()
    assert signal.getsignal(signal.SIGTERM) is before


# Broken, missing and foreign checkpoints


@pytest.mark.parametrize("file", ["state.json", "state.sha256", "parameters.safetensors", "random.safetensors", None])
def test_a_broken_checkpoint_falls_back_to_the_one_before(
    file: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        begin(tmp_path / "run", keep=9)
    newest, before = state.checkpoints(tmp_path / "run")[:2]
    assert (newest.name, before.name) == ("step-00000005", "step-00000004")
    if file is None:
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        content = bytearray((newest / file).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / file).write_bytes(content)
    result = go_on(tmp_path / "run")
    said = " ".join(result.record.notes)
    assert "step-00000005 is " in said
    assert "The one before is used. The run goes on after step 4." in said
    same_end(tmp_path / "run", tmp_path / "whole")


def test_all_broken_or_none_written_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        begin(tmp_path / "run", keep=0)
    assert not (tmp_path / "run/checkpoints").exists()
    result = go_on(tmp_path / "run", keep=1)
    assert "No checkpoint was written yet, so the run begins anew." in result.record.notes
    same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_is_finished_or_was_never_begun(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    with pytest.raises(UsageError, match="is finished, after 8 steps"):
        go_on(tmp_path / "run")
    with pytest.raises(UsageError, match=r"has no run\.yaml; expected the folder of a run"):
        resumed(tmp_path)
    with pytest.raises(UsageError, match="There is nothing to resume in"):
        train(RunConfig(output=str(tmp_path / "new"), **SETTINGS), resume=True, **given())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 1e-4}, r"learning_rate was 0\.005 and is 0\.0001"),
        ({"max_steps": 20}, "max_steps was 8 and is 20"),
        ({"r": 4}, "r was 8 and is 4"),
        ({"seed": 1}, "seed was 0 and is 1"),
    ],
)
def test_another_config_is_refused_by_name(
    change: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        begin(tmp_path / "run")
    before = (tmp_path / "run/log.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=f"This is not the run that was stopped: .*{said}"):
        go_on(tmp_path / "run", **change)
    assert (tmp_path / "run/log.jsonl").read_bytes() == before


def test_a_step_keeps_its_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        begin(tmp_path / "run")
    with pytest.raises(ConfigError, match="A step of this run has 4 examples, which 1 processes cannot share"):
        go_on(tmp_path / "run", batch_size=3)
    result = go_on(tmp_path / "run", batch_size=2)
    assert "On 1 processes, 2 batches of 2 make a step of 4 examples." in result.record.notes


def test_other_data_and_another_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        begin(tmp_path / "run")
    rows = chat.pairs(20)
    rows[7] = {**rows[7], "completion": "not so"}
    with pytest.raises(ConfigError, match="data is not what it was"):
        go_on(tmp_path / "run", data=given(train_rows=rows))
    model = chat.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    with pytest.raises(ConfigError, match="the model is not what it was"):
        go_on(tmp_path / "run", data=given(model=model))


def test_what_may_change_may_change_and_the_folder_may_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        begin(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    go_on(tmp_path / "moved", log_every=2, eval_every=2, save_every=1, keep=3, explosion=None)
    ours, theirs = tensors(tmp_path / "moved"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert set(RunConfig.model_fields) >= FREE


# What is kept


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [8, 6]),
        ({"keep": 3}, [8, 6, 4]),
        ({"keep": 1, "save_every": 1}, [8]),
        ({"keep": 1, "save_every": 1, "keep_every": 3}, [8, 6, 3]),
        ({"keep": 2, "save_every": 3}, [8, 6]),
        ({"keep": 0}, []),
    ],
    ids=str,
)
def test_retention(settings: dict[str, Any], kept: list[int], tmp_path: Path) -> None:
    begin(tmp_path / "run", **settings)
    assert [int(path.name.removeprefix("step-")) for path in state.checkpoints(tmp_path / "run")] == kept
    assert {"best", "last"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        begin(tmp_path / "run")
    save_file = state.save_file

    def full(content: Any, path: Path) -> None:
        if "00000006" in str(path):
            raise OSError(28, "No space left on device")
        save_file(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(DiskError, match="No space left on device"):
            go_on(tmp_path / "run")
    assert state.checkpoints(tmp_path / "run")[0].name == "step-00000004"
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    go_on(tmp_path / "run")
    same_end(tmp_path / "run", tmp_path / "whole")


# Stopping by itself


def test_patience_stops_after_measurements_without_gain(tmp_path: Path) -> None:
    result = begin(tmp_path / "run", eval_every=1, learning_rate=1e-9, min_delta=0.5, patience=2, max_steps=50)
    # The first measurement is the best, however small the gain.
    assert (result.record.steps, result.record.best_step, result.record.interrupted) == (3, 1, False)
    with pytest.raises(ConfigError, match="patience has no meaning when nothing is held out"):
        begin(tmp_path / "none", patience=2, eval_fraction=0)


@pytest.mark.parametrize(("metric", "choose"), [("loss", min), ("perplexity", min), ("token_accuracy", max)])
def test_the_best_by_any_metric(metric: str, choose: Any, tmp_path: Path) -> None:
    result = begin(tmp_path / "run", best_metric=metric, eval_every=1, learning_rate=0.05)
    values = {event["step"]: event[metric] for event in events(tmp_path / "run", "eval")[1:]}
    assert values[result.record.best_step] == choose(values.values())


def test_a_metric_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best_metric is 'acuracy'; task causal_lm has loss.*'token_accuracy'"):
        begin(tmp_path / "run", best_metric="acuracy")


def exploding(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Break the model after some steps, as too large a step would."""
    take = learner.Learner.take

    def breaking(self: Any, group: Any, step: int, *args: Any) -> Any:
        if step == at:
            with torch.no_grad():
                self.bare.get_output_embeddings().weight.mul_(1e3)
        return take(self, group, step, *args)

    monkeypatch.setattr(learner.Learner, "take", breaking)


def test_an_exploding_loss_ends_the_run_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exploding(monkeypatch, 7)
    model = chat.model()
    with pytest.raises(TrainingError, match=r"The loss has exploded to \d+.* at step 7, in the batch of example"):
        train(RunConfig(output=str(tmp_path / "run"), **SETTINGS), **given(model=model))
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert events(tmp_path / "run", "step")[-1]["step"] == 6
    assert state.checkpoints(tmp_path / "run")[0].name == "step-00000006"
    (error,) = events(tmp_path / "run", "error")
    assert "exploded" in error["message"]


def test_explosion_can_be_let_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exploding(monkeypatch, 7)
    assert begin(tmp_path / "run", explosion=None).record.steps == 8
