"""``veneer export``: exit codes, documents, and mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from tests import models
from tests.adapters.making import reconfigure, saved
from veneer.cli.main import main


@pytest.fixture
def base(tmp_path: Path) -> Path:
    models.make("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    folder = saved(tmp_path / "adapter")
    reconfigure(folder, base_model_name_or_path=str(base))
    return folder


def test_vllm_takes_it(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(adapter), "--check", "vllm"]) == 0
    out = capsys.readouterr().out
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules adapter={adapter}" in out
    assert "problem" not in out


def test_vllm_does_not(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reconfigure(adapter, use_dora=True, modules_to_save=["lm_head"])
    assert main(["export", str(adapter), "--check", "vllm"]) == 1
    out = capsys.readouterr().out
    assert out.count("problem:") == 2
    assert 'modules_to_save is ["lm_head"]; merge it into the base with veneer merge' in out
    assert main(["export", str(adapter), "--check", "vllm", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["takes_it"], document["command"]) == (False, None)
    assert [finding["blocks"] for finding in document["findings"]] == [True, True]


def test_the_bases_architecture(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.make("gpt2").save_pretrained(tmp_path / "gpt2")
    assert main(["export", str(adapter), "--check", "vllm", "--model", str(tmp_path / "gpt2")]) == 1
    assert "no LoRA for the architecture 'gpt2'" in capsys.readouterr().out
    for named in ("/no/such/model", None):
        reconfigure(adapter, base_model_name_or_path=named)
        assert main(["export", str(adapter), "--check", "vllm"]) == 0
        assert "note: the base model's config was not found" in capsys.readouterr().out


def test_the_servers_rank(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(adapter), "--check", "vllm", "--max-lora-rank", "64"]) == 0
    assert "--max-lora-rank 64" in capsys.readouterr().out
    assert main(["export", str(adapter), "--check", "vllm", "--max-lora-rank", "1"]) == 1
    assert main(["export", str(adapter), "--check", "vllm", "--max-lora-rank", "20"]) == 2


def test_gguf(adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "adapter.gguf"
    arguments = ["export", str(adapter), "--to", "gguf", "--model", str(base), "--output", str(output)]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["architecture"], document["alpha"], len(document["tensors"])) == ("llama", 6.0, 14)
    assert len(gguf.GGUFReader(output).tensors) == 28
    assert main(arguments) == 2
    assert "exists already; give another name, or --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert f"llama-cli -m BASE.gguf --lora {output}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "Expected one of --check and --to"),
        (["--check", "vllm", "--to", "gguf"], "Expected one of --check and --to"),
        (["--check", "vlm"], "--check is 'vlm'; expected vllm. Did you mean 'vllm'?"),
        (["--to", "guf"], "Did you mean 'gguf'?"),
        (["--to", "gguf"], "--to gguf needs --model, the base model, and --output"),
        (["--to", "gguf", "--model", "x", "--output", "y", "--max-lora-rank", "8"], "belongs to --check vllm"),
        (["--check", "vllm", "--output", "y"], "--check writes nothing"),
        (["--check", "vllm", "--force"], "--check writes nothing"),
        (["--to", "gguf", "--model", "/no/such", "--output", "no/such.gguf"], "There is no folder '/no/such'"),
        (["--to", "gguf", "--model", "x", "--output", "."], "is a folder; expected the name of a file"),
    ],
)
def test_flags_without_meaning(
    flags: list[str], sentence: str, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapter), *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_an_adapter_that_gguf_cannot_hold(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reconfigure(adapter, use_dora=True)
    output = tmp_path / "x.gguf"
    assert main(["export", str(adapter), "--to", "gguf", "--model", str(base), "--output", str(output)]) == 2
    assert "veneer convert" in capsys.readouterr().err
    assert not output.exists()
