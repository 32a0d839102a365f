"""FSDP2 on two gloo processes: losses, adapters and files of a split model are those of one process.

Everything runs in three lots of processes, since starting them is most of what this takes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_processes import adapter, losses, runs
from veneer.core.errors import TrainingError
from veneer.train import state
from veneer.train.shards import gathered

CASES: dict[str, dict[str, Any]] = {
    # With one row in A, the second process holds no part of it.
    "lora": {"r": 1, "lora_alpha": 1, "accumulation": 2, "save_every": 1, "keep": 9},
    "everywhere": {
        "target_modules": ["embed_tokens", "q_proj", "down_proj"],
        "modules_to_save": ["lm_head"],
        "samples": 1,
    },
    "checkpointed": {"checkpoint": "on", "kernels": "off", "use_dora": True, "precision": "auto"},
    "full": {"method": "full", "tied": True, "learning_rate": 1e-3},
    "head": {"method": "head", "optimizer": "sgd", "learning_rate": 0.1},
}


def settings(case: str) -> dict[str, Any]:
    own = CASES[case]
    # Of SETTINGS, which is for adapters.
    return {"target_modules": None, **own} if "method" in own else own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, of two that split the model, and of each going on where the other stopped."""
    place = tmp_path_factory.mktemp("shards")

    def lot(kind: str, **more: Any) -> list[dict[str, Any]]:
        return [{"output": str(place / f"{case} {kind}"), **settings(case), **more} for case in CASES]

    codes, said = runs(
        [*lot("whole", batch_size=4), {**lot("whole", batch_size=4)[0], "output": str(place / "1 to 2"), "stop_at": 3}],
        1,
    )
    assert codes == {143}, said
    codes, said = runs(
        [
            *lot("split", batch_size=2),
            {"output": str(place / "1 to 2"), "resume": True, "batch_size": 2, "strategy": "fsdp"},
            {**lot("split", batch_size=2)[0], "output": str(place / "2 to 1"), "stop_at": 3, "strategy": "auto"},
        ],
        2,
        # As accelerate launch sets them for a config that says so.
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    )
    assert codes == {143}, said
    shutil.copytree(place / "2 to 1", place / "stopped")
    codes, said = runs([{"output": str(place / "2 to 1"), "resume": True, "batch_size": 4, "strategy": "ddp"}], 1)
    assert codes == {0}, said
    return place


def files(run: Path, name: str) -> dict[str, torch.Tensor]:
    whole = run / name / "model.safetensors"
    return load_file(whole) if whole.is_file() else adapter(run, name)


def same(split: Path, whole: Path) -> None:
    for name in ("last", "best"):
        ours, theirs = files(split, name), files(whole, name)
        assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=3e-5, msg=key)
    for kind in ("step", "eval"):
        assert losses(split, kind) == [(step, pytest.approx(loss, abs=1e-5)) for step, loss in losses(whole, kind)]


@pytest.mark.parametrize("case", CASES)
def test_a_split_model_learns_what_a_whole_one_does(case: str, folder: Path) -> None:
    same(folder / f"{case} split", folder / f"{case} whole")


@pytest.mark.parametrize("way", ["1 to 2", "2 to 1"])
def test_a_run_goes_on_with_another_strategy(way: str, folder: Path) -> None:
    same(folder / way, folder / "lora whole")


def test_the_config_and_metadata_of_a_split_model_are_those_of_a_whole_one(folder: Path) -> None:
    """torch gives split modules another class, and the values of a split base cannot be read one by one."""
    for run, name in (("full", "config.json"), ("lora", "adapter_config.json"), ("everywhere", "adapter_config.json")):
        split, whole = (
            json.loads((folder / f"{run} {kind}" / "last" / name).read_text()) for kind in ("split", "whole")
        )
        assert split == whole
    from safetensors import safe_open

    for run in ("lora", "everywhere"):
        marks = [
            safe_open(folder / f"{run} {kind}" / "last" / "adapter_model.safetensors", "pt").metadata()
            for kind in ("split", "whole")
        ]
        assert marks[0] == marks[1]


def test_a_checkpoint_of_a_split_model_is_whole(folder: Path) -> None:
    """Parameters and optimiser state have the shapes that one process would write."""
    newest = state.checkpoints(folder / "stopped")[0]
    assert newest.name == "step-00000003"
    saved, plain = state.read(newest), state.read(folder / "lora whole" / "checkpoints" / newest.name)
    for name in ("parameters.safetensors", "optimiser.safetensors"):
        found, expected = saved.tensors[name], plain.tensors[name]
        assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in expected.items()}
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=3e-5, msg=key)
    assert len(saved.values["random"]) == 2


def test_a_split_model_writes_the_answers_of_a_whole_one(folder: Path) -> None:
    """All processes generate together."""
    written = [
        [
            event["samples"]
            for event in map(json.loads, (folder / run / "log.jsonl").read_text().splitlines())
            if event["event"] == "samples"
        ]
        for run in ("everywhere split", "everywhere whole")
    ]
    assert written[0] == written[1]
    assert len(written[0]) > 1


def test_the_run_says_that_the_model_is_split(folder: Path) -> None:
    first = json.loads((folder / "lora split" / "log.jsonl").read_text().splitlines()[0])
    assert any("FSDP2: the model is split over 2 processes at LlamaDecoderLayer" in note for note in first["notes"])
    assert first["processes"] == 2


@pytest.mark.parametrize("found", [torch.empty(0, 4), torch.ones(1, 4)])
def test_nothing_is_saved_of_a_tensor_that_did_not_come_together(found: torch.Tensor) -> None:
    with pytest.raises(TrainingError, match=r"lora_A came together .*, expected \(2, 4\); nothing is saved"):
        gathered([("lora_A", found)], {"lora_A": torch.Size([2, 4])}, keep=False)


def test_a_tensor_without_values_is_not_saved() -> None:
    with pytest.raises(TrainingError, match="nothing is saved"):
        gathered([("lora_A", torch.empty(0, 4))], {}, keep=True)


def test_tensors_that_come_and_go_are_told_apart() -> None:
    """Each may get the address of the one before it."""
    parts = ((str(number), torch.full((2,), float(number))) for number in range(20))
    found = gathered(parts, {}, keep=True)
    assert [float(tensor[0]) for tensor in found.values()] == list(range(20))


def test_one_tensor_under_two_names_stays_one() -> None:
    table = torch.ones(2, 2)
    found = gathered([("embed", table), ("head", table)], {}, keep=True)
    assert found["embed"] is found["head"]
    assert found["embed"] is not table
