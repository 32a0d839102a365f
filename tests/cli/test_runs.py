"""``veneer runs``: on the folders that ``veneer train`` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import chat
from veneer.cli.main import main
from veneer.train.config import RunConfig
from veneer.train.loop import train


def trained(output: Path, **settings: object) -> None:
    config = RunConfig(output=str(output), batch_size=4, max_steps=2, target_modules=["q_proj"], **settings)
    train(config, model=chat.model(), tokenizer=chat.tokenizer(), train_rows=chat.pairs(12))


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "runs" / "a", r=2)
    trained(tmp_path / "runs" / "b", r=4, seed=1)
    picture = tmp_path / "curves.png"
    assert main(["runs", str(tmp_path / "runs"), "--compare", "--plot", str(picture), "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["differing"] == ["seed", "r"]
    assert [(run["name"], run["state"], run["steps"]) for run in document["runs"]] == [
        ("a", "finished", 2),
        ("b", "finished", 2),
    ]
    for run in document["runs"]:
        record = json.loads((Path(run["folder"]) / "result.json").read_text())
        assert run["best_loss"] == record["best_loss"]
        assert run["tokens_per_second"] == pytest.approx(record["tokens_per_second"])
        assert run["config"]["target_modules"] == ["q_proj"]
    assert "best loss" in err
    assert picture.is_file()
    assert main(["runs", str(tmp_path), "--plot", str(picture)]) == 2
    assert "exists; name another file, or use --force" in capsys.readouterr().err
    assert main(["runs", str(tmp_path), "--plot", str(picture), "--force"]) == 0


def test_the_folder_at_hand_is_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path / "a")
    start = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[0])
    assert {"veneer", "torch", "transformers", "python"} <= start["versions"].keys()
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert "lora r=8" in capsys.readouterr().out
    assert main(["runs", "--compare"]) == 2
    assert "There is only one run, 'a'" in capsys.readouterr().err
