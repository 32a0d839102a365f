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
    assert "None of the 8 rows can be used; the first: rows.jsonl:1 has the columns" in capsys.readouterr().err


def test_the_cache_is_said_to_be_used(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat.written(place / "a.jsonl", chat.pairs(5))
    chat.written(place / "b.jsonl", chat.pairs(3))
    given = ["data", str(place / "a.jsonl"), "--model", str(place / "model"), "--cache", str(place / "kept")]
    assert main(given) == 0
    assert f"now kept in {place}/kept/" in " ".join(capsys.readouterr().out.split())
    assert main([*given, "--json", "--workers", "2"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["from_cache"], first["cache"]) == ([True], [str(next((place / "kept").glob("[!.]*")))])
    # Each part is kept alone.
    assert main([*given, str(place / "b.jsonl"), "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert (both["from_cache"], both["examples"]) == ([True, False], 8)
    assert main([*given[:-1], "off", "--json"]) == 0
    off = json.loads(capsys.readouterr().out)
    assert (off["cache"], off["fingerprint"]) == ([None], first["fingerprint"])


def test_what_does_not_fit_the_model_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "red"}, {"text": "stone " * 200}, {"text": "river <|new|>"}, {"prompt": "a", "completion": " "}]
    chat.written(place / "rows.jsonl", rows)
    tokenizer = chat.tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    beyond = len(tokenizer) - 1
    tokenizer.save_pretrained(place / "model")
    chat.model(vocabulary=beyond).save_pretrained(place / "model")
    given = ["data", str(place / "rows.jsonl"), "--model", str(place / "model"), "--json"]
    assert main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bad_rows"] == [
        f"rows.jsonl:3 has the token {beyond} ('<|new|>'), outside of the model's vocabulary of {beyond}; use the "
        "model's own tokenizer, or a model with an embedding for each token.",
        "rows.jsonl:4 has an empty completion; expected text to learn.",
    ]
    assert (found["truncated"], found["longest"]) == (1, 128)
    assert any("takes 128 tokens at most" in note and "rows.jsonl:2 is the first" in note for note in found["notes"])
    # What is too long is a bad row where that is asked for.
    assert main([*given, "--truncate", "fail"]) == 0
    assert json.loads(capsys.readouterr().out)["bad_rows"][0].startswith("rows.jsonl:2 has 203 tokens, and at most 128")
    (place / "model/config.json").unlink()
    assert main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bad"], "no config.json" in found["notes"][0]) == (1, True)
