"""``veneer merge``: what it writes is a plain model with the adapter's outputs, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests import chat
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.cli import merge as verb
from veneer.cli.main import main
from veneer.evaluate.equality import Difference
from veneer.tasks.loading import load_model, load_tokenizer


def trained(model: Path, folder: Path, *, seed: int = 0, **config: object) -> Path:
    """A saved adapter that changes the outputs."""
    adapted = get_peft_model(load_model(model), LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return chat.saved(tmp_path / "tiny", tied=True)


def _merge(model: Path, output: Path, *adapters: Path, more: tuple[str, ...] = ()) -> int:
    flags = [text for adapter in adapters for text in ("--adapter", str(adapter))]
    return main(["merge", "--model", str(model), *flags, "--output", str(output), *more])


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_plain_transformers_gives_the_adapters_outputs(
    model: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(model, tmp_path / "adapter")
    output = tmp_path / "merged"
    assert _merge(model, output, adapter, more=("--dtype", dtype, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == 8
    assert report["dtype"] == ("float32" if dtype == "auto" else dtype)
    merged = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    expected = PeftModel.from_pretrained(load_model(model), adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted, found = expected(ids).logits, merged(ids).logits
    close = 1e-5 if report["dtype"] == "float32" else 0.03
    assert torch.allclose(wanted, found, atol=close * float(wanted.abs().max()))
    assert load_tokenizer(output).chat_template == load_tokenizer(model).chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged", "tiny"]


@pytest.mark.filterwarnings("ignore:.*does not reach lm_head:UserWarning")
def test_a_tied_head_that_is_adapted(model: Path, tmp_path: Path) -> None:
    adapter = trained(model, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    assert _merge(model, tmp_path / "merged", adapter) == 0


def test_several_adapters_add_up(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = trained(model, tmp_path / "one"), trained(model, tmp_path / "two", seed=1)
    assert _merge(model, tmp_path / "merged", one, two, more=("--json",)) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == ["one", "two"]


def test_an_existing_output_stays(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    assert _merge(model, tmp_path / "there", trained(model, tmp_path / "adapter")) == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "there").iterdir()) == []


def test_a_difference_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Difference, "bound", property(lambda self: -1.0))
    assert _merge(model, tmp_path / "merged", trained(model, tmp_path / "adapter")) == 1
    err = capsys.readouterr().err
    assert "more than rounding in float32 explains" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "tiny"]


def test_a_full_disk_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verb, "_copy_tokenizer", full)
    assert _merge(model, tmp_path / "merged", trained(model, tmp_path / "adapter")) == 1
    assert "No space left on device; nothing was left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "tiny"]


def test_an_effect_lost_in_rounding_is_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted = get_peft_model(load_model(model), LoraConfig(r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-5)
    adapted.save_pretrained(tmp_path / "weak")
    with pytest.warns(UserWarning, match="hides half or more of what the adapter changes"):
        verb.merge_into_folder(model, [str(tmp_path / "weak")], tmp_path / "merged", dtype="bfloat16")


def test_a_model_without_tokenizer_is_told(model: Path, tmp_path: Path) -> None:
    adapter = trained(model, tmp_path / "adapter")
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.warns(UserWarning, match="The merged model has no tokenizer"):
        verb.merge_into_folder(model, [str(adapter)], tmp_path / "merged")
