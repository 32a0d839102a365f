from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import chat
from veneer.cli.main import main


@pytest.fixture
def place(tmp_path: Path) -> Path:
    chat.model().save_pretrained(tmp_path / "model")
    chat.tokenizer().save_pretrained(tmp_path / "model")
    good = [json.dumps({"question": row["prompt"], "answer": row["completion"]}) for row in chat.pairs(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*good, "{", "[1]"]))
    return tmp_path


def test_what_training_would_see(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        str(place / "rows.jsonl"),
        "--model",
        str(place / "model"),
        "--columns",
        "prompt=question,completion=answer",
    ]
    assert main(["data", *given]) == 0
    out = capsys.readouterr().out
    assert "8, 2 of them bad" in out
    assert "rows.jsonl:7 is not a line of JSON" in out
    assert "⟦" in out
    assert main(["data", *given, "--json", "--preview", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], len(found["bad_rows"])) == (6, 2)
    assert found["length_percentiles"]["0"] <= found["length_percentiles"]["50"] <= found["longest"]
    assert 0 <= found["padding"] < 1


def test_nothing_that_can_be_used(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(place / "rows.jsonl"), "--model", str(place / "model")]) == 1
    assert "None of the 6 rows can be used; the first: " in capsys.readouterr().err
