"""``veneer resize``: its table, its document, and every mistake in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.adapters.making import close, reconfigure, saved, updates_in
from veneer.adapters import files
from veneer.adapters.resize import resize
from veneer.cli.main import main


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter")


def run(adapter: Path, output: Path, *more: str) -> int:
    return main(["resize", str(adapter), "--output", str(output), *more])


def test_the_document_and_the_table(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(adapter, tmp_path / "b", "--r", "2", "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    _, report = resize(files.read(adapter), 2)
    assert [layer["kept"] for layer in document["layers"]] == [layer.kept for layer in report]
    assert {layer["r"] for layer in document["layers"]} == {2}
    norms = [layer.norm**2 for layer in report if layer.norm]
    kept = sum(n * layer.kept for n, layer in zip(norms, report, strict=True)) / sum(norms)
    assert document["kept"] == pytest.approx(kept)
    assert document["error"] ** 2 == pytest.approx(1 - kept, rel=1e-4)
    assert document["bytes"] == document["bytes_before"] / 2
    assert document["notes"] == []
    for part in ("model.layers.0.self_attn.q_proj", f"{100 * report[0].kept:.0f}", "energy kept"):
        assert part in err
    assert "energy kept" in (tmp_path / "b" / "README.md").read_text()


def test_a_share_of_the_energy(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(adapter, tmp_path / "b", "--energy", "0.8", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert all(layer["kept"] >= 0.8 for layer in document["layers"])
    assert len({layer["r"] for layer in document["layers"]}) > 1


def test_a_higher_rank_is_filled_up_and_says_so(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(adapter, tmp_path / "b", "--r", "7") == 0
    assert "14 of 14 layers had a lower rank and were filled up with zeros" in capsys.readouterr().err
    close(updates_in(tmp_path / "b"), updates_in(adapter))


def test_the_tokenizer_goes_along(adapter: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).write_text(name)
    (adapter / "result.json").write_text("{}")
    assert run(adapter, tmp_path / "b", "--r", "2") == 0
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "chat_template.jinja"


def test_an_output_that_exists(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = saved(tmp_path / "b", r=1)
    before = (output / "adapter_config.json").read_text()
    assert run(adapter, output, "--r", "2") == 2
    assert "exists already; give the name of a new folder, or --force" in capsys.readouterr().err
    assert (output / "adapter_config.json").read_text() == before
    assert run(adapter, output, "--r", "2", "--force") == 0
    assert updates_in(output)
    # Over itself too: all of it is read before anything is written.
    assert run(adapter, adapter, "--r", "1", "--force") == 0
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 1
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    assert run(adapter, tmp_path / "notes", "--r", "2", "--force") == 2
    assert "is no adapter's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "Neither --r nor --energy is given"),
        (["--r", "2", "--energy", "0.5"], "--r and --energy are both given"),
        (["--r", "0"], "--r is 0"),
        (["--energy", "0"], "--energy is 0.0; expected a share from above 0 to 1"),
        (["--energy", "95"], "--energy is 95.0"),
        (["--energy", "nan"], "--energy is nan"),
        (["--r", "many"], "Invalid value for '--r'"),
    ],
)
def test_ranks_that_are_none(
    flags: list[str], sentence: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(adapter, tmp_path / "b", *flags) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_what_is_no_adapter(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "adaptr", tmp_path / "b", "--r", "2") == 2
    assert "Did you mean 'adapter'" in capsys.readouterr().err
    reconfigure(adapter, r=3)
    assert run(adapter, tmp_path / "b", "--r", "2") == 1
    assert "expected two matrices of rank 3" in capsys.readouterr().err
