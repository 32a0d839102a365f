"""Two processes that each see a part of the data start from all of it, and alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.inits.two_processes import BATCHES, started

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "inits" / "two_processes.py")]
    running = [
        subprocess.Popen([*command, str(rank), str(place)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return place


@pytest.mark.parametrize("init", ["corda", "lora_ga", "eva"])
def test_both_start_alike_and_from_all_data(init: str, folder: Path) -> None:
    one, two = (load_file(folder / f"{init}-{rank}.safetensors") for rank in range(2))
    alone = started(init, BATCHES)
    assert one.keys() == two.keys() == alone.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        torch.testing.assert_close(tensor.abs(), alone[name].abs(), rtol=1e-2, atol=1e-3)
