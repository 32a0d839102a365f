"""``veneer merge --into``: the base in full precision, or as the run quantised it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import chat
from veneer.cli.main import main
from veneer.tasks.loading import load_model
from veneer.train.config import RunConfig
from veneer.train.loop import train

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("default:Quantised numbers are rounded:UserWarning")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat.saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=["nf4", "int8"])
def run(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    settings = {"learning_rate": 5e-2, "max_steps": 4, "target_modules": "all-linear", "batch_size": 4}
    train(RunConfig(model=str(tiny), output=str(folder), quantize=request.param, **settings), train_rows=chat.pairs(12))
    return folder


def merged(model: Path, run: Path, output: Path, *more: str) -> int:
    return main(["merge", "--model", str(model), "--adapter", str(run), "--output", str(output), "--json", *more])


@pytest.mark.parametrize("into", ["full", "dequantised", "requantised"])
def test_each_says_how_far_the_logits_moved(
    tiny: Path, run: Path, into: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert merged(tiny, run, tmp_path / "merged", "--into", into) == 0
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert report["into"] == into
    assert report["layers"] == 14
    relative = report["max_logit_difference"] / report["logit_scale"]
    rounds = into == "requantised" or (run.name == "int8" and into != "full")
    assert (relative < 1e-4) != rounds
    assert ("Quantised numbers are rounded" in said.err) == rounds
    again = load_model(tmp_path / "merged")
    kind = type(again.model.layers[0].self_attn.q_proj).__name__
    assert kind == ("Linear" if into != "requantised" else "Linear4bit" if run.name == "nf4" else "Linear8bitLt")
    assert again(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_base_whose_files_are_quantised(
    tiny: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(tiny, quantize=run.name).save_pretrained(tmp_path / "stored")
    assert merged(tmp_path / "stored", run, tmp_path / "merged") == 2
    assert "give the base in full precision as --model, or choose --into dequantised" in capsys.readouterr().err
    assert merged(tmp_path / "stored", run, tmp_path / "merged", "--into", "dequantised") == 0
    assert type(load_model(tmp_path / "merged").model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ("requantized", "--into is 'requantized'; expected full, dequantised, requantised. Did you mean 'requantised'"),
        ("dequantised", "there is no run.yaml with quantize beside it. Leave --into at full."),
    ],
)
def test_an_into_without_meaning(
    tiny: Path, tmp_path: Path, into: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 1, "target_modules": "all-linear", "batch_size": 4}
    train(RunConfig(model=str(tiny), output=str(tmp_path / "run"), **settings), train_rows=chat.pairs(12))
    capsys.readouterr()
    assert merged(tiny, tmp_path / "run", tmp_path / "merged", "--into", into) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "merged").exists()
