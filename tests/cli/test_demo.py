"""``veneer demo`` from end to end on a tiny model, nothing fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tests import chat
from veneer.cli.demo import make_room
from veneer.cli.main import main
from veneer.core.errors import UsageError


def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "tiny"
    chat.model(max_position_embeddings=512).save_pretrained(model)
    chat.tokenizer().save_pretrained(model)
    output = tmp_path / "demo"
    flags = ["demo", "--model", str(model), "--examples", "16", "--output", str(output)]
    assert main([*flags, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report == json.loads((output / "demo.json").read_text(encoding="utf-8"))
    assert report["run"]["held_out_after"]["loss"] < report["run"]["held_out_before"]["loss"]
    assert len(report["answers"]) == 3
    assert report["reload_difference"] == 0.0
    assert report["adapter_bytes"] > 0
    assert Path(report["plot"]).read_bytes().startswith(b"\x89PNG")
    assert "held-out loss" in err
    assert "merged model" in err
    assert f"veneer inspect {output}/run" in err
    assert transformers.AutoModelForCausalLM.from_pretrained(output / "merged").config.model_type == "llama"
    assert (
        main(["eval", "--model", str(model), "--adapter", str(output / "run"), "--data", f"{output}/held_out.jsonl"])
        == 0
    )

    assert main(flags) == 2
    assert "exists already; name another with --output, or use --force" in capsys.readouterr().err


def test_force_only_replaces_a_demo(tmp_path: Path) -> None:
    make_room(tmp_path / "demo", force=False)
    (tmp_path / "demo" / "left").touch()
    make_room(tmp_path / "demo", force=True)
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["demo.json"]
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="no earlier demo's"):
        make_room(tmp_path / "other", force=True)
