from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import chat
from veneer.cli.main import main
from veneer.engine import matmul
from veneer.evaluate import scoring
from veneer.tasks import writing


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data and a run, which the command runs in."""
    chat.saved(tmp_path / "model")
    chat.written(tmp_path / "train.jsonl", chat.pairs(12))
    chat.written(tmp_path / "test.jsonl", chat.pairs(3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["eval", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_figures_are_those_of_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "model", "--data", "train.jsonl", "--eval-data", "test.jsonl", "--output", "run"]
    assert main(["train", *flags, "--learning-rate", "5e-3", "--epochs", "2", "--batch-size", "4"]) == 0
    record = json.loads((place / "run/result.json").read_text())
    base = evaluate(capsys, "--model", "model", "--data", "test.jsonl")
    adapted = evaluate(capsys, "--model", "model", "--adapter", "run", "--data", "test.jsonl")
    alone = evaluate(capsys, "--adapter", "run", "--data", "test.jsonl", "--batch-size", "1")
    assert base["loss"] == pytest.approx(record["held_out_before"]["loss"], rel=1e-5)
    assert adapted["loss"] == pytest.approx(record["best_loss"], rel=1e-5)
    assert alone["loss"] == pytest.approx(adapted["loss"], rel=1e-5)
    assert adapted["loss"] < base["loss"]


def test_humans_get_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "model", "--data", "test.jsonl"]) == 0
    out = capsys.readouterr().out
    for word in ("loss", "perplexity", "token accuracy", "3 examples"):
        assert word in out


def test_of_a_folder_the_test_file_is_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(capsys, "--model", "model", "--data", ".")
    assert found["data"]["rows"] == 3
    assert found["notes"] == ["Of ., test.jsonl is measured on."]


@pytest.mark.parametrize(("library", "precision"), [("torch", "highest"), ("onednn", "medium"), ("auto", "medium")])
def test_products_go_to_the_library_that_is_asked_for(
    library: str, precision: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for module, name in ((scoring, "score"), (writing, "write")):
        own = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, own=own, **k: (found.append(torch.get_float32_matmul_precision()), own(*a, **k))[1]
        )
    monkeypatch.setattr(matmul, "check", lambda library: None)
    monkeypatch.setattr(matmul, "measure", lambda width: matmul.Matmuls(1.0, 2.0, 1e-7))
    flags = ["--model", "model", "--data", "test.jsonl", "--matmul", library]
    evaluate(capsys, *flags)
    assert main(["predict", *flags, "--max-new-tokens", "2"]) == 0
    assert found == [precision, precision]
    assert torch.get_float32_matmul_precision() == "highest"


def test_all_tokens_can_count(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = evaluate(capsys, "--model", "model", "--data", "test.jsonl")
    every = evaluate(capsys, "--model", "model", "--data", "test.jsonl", "--train-on", "all", "--max-length", "10")
    assert some["data"]["trained_tokens"] != every["data"]["trained_tokens"] == 27
    assert every["data"]["truncated"] == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "test.jsonl"], 2, "Give --model, --adapter, or both."),
        (["--model", "model", "--data", "nowhere.jsonl"], 2, "no file or folder 'nowhere.jsonl'"),
        (["--model", "model", "--adapter", "model", "--data", "test.jsonl"], 2, "whole model, not an adapter"),
        (["--model", "model", "--data", "test.jsonl", "--task", "causal"], 2, "expected one of: causal_lm"),
        (["--model", "model", "--data", "test.jsonl", "--batch-size", "0"], 2, "batch_size is '0'"),
    ],
)
def test_bad_input(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["eval", *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_has_an_example(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["eval", "-h"]) == 0
    assert "veneer eval --model ./model --adapter ./run --data test.jsonl" in capsys.readouterr().out
