"""``veneer generate``: streams one answer, shows several side by side, and tells what is wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tests import chat
from veneer import LoraConfig, UsageError, get_peft_model
from veneer.cli.generate import adapter_names
from veneer.cli.main import main
from veneer.tasks.loading import load_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return chat.saved(tmp_path / "tiny")


def _adapter(model: Path, folder: Path) -> Path:
    adapted = get_peft_model(load_model(model), LoraConfig(r=4, init_lora_weights=False, lora_alpha=64))
    adapted.save_pretrained(folder)
    return folder


def _generate(model: Path, *more: str, prompt: str = "the stone is") -> int:
    return main(["generate", "--model", str(model), "--prompt", prompt, "--max-new-tokens", "6", *more])


def test_streams_what_json_holds(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _generate(model) == 0
    out, err = capsys.readouterr()
    assert "base: 6 tokens" in err
    assert _generate(model, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["answers"][0]["text"].strip() == out.strip()


def test_one_adapter(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _generate(model, "--adapter", str(_adapter(model, tmp_path / "run" / "last")), "--json") == 0
    (one,) = json.loads(capsys.readouterr().out)["answers"]
    assert one["adapter"] == "last"


def test_several_adapters_stand_side_by_side(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = _adapter(model, tmp_path / "one"), _adapter(model, tmp_path / "two")
    assert _generate(model, "--adapter", str(one), "--adapter", str(two)) == 0
    top = capsys.readouterr().out.splitlines()[0]
    assert 0 <= top.index("base") < top.index("one") < top.index("two")


def test_a_prompt_from_stdin(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the river"))
    assert _generate(model, "--json", prompt="-") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "the river"


def test_what_is_wrong_is_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = _adapter(model, tmp_path / "one")
    for flags, expected in (
        (("--adapter", str(adapter), "--adapter", str(adapter)), "The same adapter is given twice"),
        (("--adapter", str(model)), "holds a whole model"),
        (("--temperature", "-1"), "temperature is -1"),
        (("--dtype", "float3"), "Did you mean 'float32'"),
    ):
        assert _generate(model, *flags) == 2
        assert expected in capsys.readouterr().err


def test_names_tell_adapters_apart() -> None:
    assert adapter_names(["a/one", "b/two/"]) == ["one", "two"]
    assert adapter_names(["a/best", "b/best"]) == ["a-best", "b-best"]
    assert adapter_names(["a/v1.0 (old)"]) == ["v1_0__old_"]
    assert adapter_names(["a/base"]) == ["run-base"]
    assert adapter_names(["a/values"]) == ["run-values"]
    assert adapter_names(["a/-x"]) == ["run--x"]
    with pytest.raises(UsageError, match="twice"):
        adapter_names(["a", "./a"])
