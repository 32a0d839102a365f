"""Two processes do the run that one does: the same losses and adapter, also where one takes over from the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from veneer.train import state

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    "max_steps": 5,
    "eval_every": 2,
    "learning_rate": 5e-3,
    "target_modules": "all-linear",
    "max_tokens": 60,
}


def run(folder: Path, processes: int, **settings: Any) -> tuple[set[int], str]:
    """Run it on so many processes; their exit codes, and what they said."""
    return runs([{"output": str(folder), **settings}], processes)


def runs(
    each: list[dict[str, Any]], processes: int, variables: Mapping[str, str] | None = None
) -> tuple[set[int], str]:
    """Several runs one after the other in the same processes, with these environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "ACCELERATE", "FSDP"))},
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        **(variables or {}),
    }
    settings = json.dumps([{**(SETTINGS if not one.get("resume") else {}), **one} for one in each])
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("two_processes.py")), settings]
    running = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        running.append(subprocess.Popen(command, env={**environment, **ranks}, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return {process.returncode for process in running}, "\n".join(said)


def losses(folder: Path, kind: str = "step") -> list[tuple[int, float]]:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(event["step"], event["loss"]) for event in events if event["event"] == kind]


def adapter(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "adapter_model.safetensors")


def same(one: Path, other: Path) -> None:
    """Equal but for the order of sums in float32."""
    for name in ("last", "best"):
        ours, theirs = adapter(one, name), adapter(other, name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=2e-5, msg=key)
    for kind in ("step", "eval"):
        found, expected = losses(one, kind), losses(other, kind)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    codes, said = run(folder, 1, batch_size=4)
    assert codes == {0}, said
    return folder


def test_two_learn_what_one_does(alone: Path, tmp_path: Path) -> None:
    codes, said = run(tmp_path / "run", 2, batch_size=2)
    assert codes == {0}, said
    same(tmp_path / "run", alone)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_takes_over(before: int, after: int, alone: Path, tmp_path: Path) -> None:
    """One of two is told to end by SIGTERM, and both end at the same step."""
    codes, said = run(tmp_path / "run", before, batch_size=4 // before, stop_at=3)
    assert codes == {143}, said
    assert state.checkpoints(tmp_path / "run")[0].name == "step-00000003"
    codes, said = run(tmp_path / "run", after, resume=True, batch_size=4 // after)
    assert codes == {0}, said
    same(tmp_path / "run", alone)


def test_a_loss_that_breaks_on_one_process_ends_both(tmp_path: Path) -> None:
    """The process with whole losses does not wait for ever, and both say which rows it was."""
    codes, said = run(tmp_path / "run", 2, batch_size=2, break_at=3)
    assert codes == {1}, said
    told = [line for line in said.splitlines() if "The loss is nan at step 3, in the batch of example" in line]
    assert len(told) == 2
    assert told[0] == told[1]
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "run").values())


def test_processes_that_do_not_find_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would do the whole run, and write over the other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    from accelerate import PartialState

    from veneer.core.errors import UsageError
    from veneer.train.config import RunConfig
    from veneer.train.processes import joined

    PartialState()
    with pytest.raises(UsageError, match="The launcher started 2 processes, but accelerate joined 1"):
        joined(RunConfig(output="run"))
