"""``veneer inspect`` on a model without weights, and on an adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests import chat, models
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.cli.main import main
from veneer.tasks.loading import load_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = chat.saved(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    return folder


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "0..1 2 x LlamaDecoderLayer" in out
    assert "model.layers.*.self_attn.q_proj" in out
    assert "q_proj, k_proj" not in out
    assert "trainable" in out


def test_the_config_decides(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--r", "4", "--target-modules", "q_proj,up_proj", "--rank-pattern", "up_proj=2", "--lora-alpha", "16"]
    match = _json(capsys, "inspect", str(model), *flags)["match"]
    assert {(target["path"].rpartition(".")[2], target["r"]) for target in match["targets"]} == {
        ("q_proj", 4),
        ("up_proj", 2),
    }
    assert match["trainable"] == 2 * (4 * (32 + 32) + 2 * (32 + 48))


def test_the_task_decides_the_head(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "inspect", str(model), "--task", "seq_cls")
    assert found["class"] == "LlamaForSequenceClassification"
    assert found["match"]["saved"] == [["score", 64]]


def test_patterns_that_match_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--target-modules", "q_porj"]) == 2
    assert "Did you mean 'q_proj'" in capsys.readouterr().err


def test_without_default_targets(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    transformers.CTRLConfig(n_embd=32, n_head=2, n_layer=1, dff=8, architectures=["CTRLModel"]).save_pretrained(model)
    assert main(["inspect", str(model)]) == 0
    assert "no default for model type 'ctrl'" in capsys.readouterr().err
    assert main(["inspect", str(model), "--r", "2"]) == 2


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapted = get_peft_model(load_model(chat.saved(tmp_path / "base")), LoraConfig(r=2, alpha_pattern={"v_proj": 4}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "run" / "best")
    return tmp_path / "run"


def test_an_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "inspect", str(adapter))
    adapted = PeftModel.from_pretrained(load_model(adapter.parent / "base"), adapter / "best")
    assert len(found["layers"]) == 8
    for layer in found["layers"]:
        live = adapted.base_model.layers[layer["path"]]
        A, B = live.lora_A["default"].weight, live.lora_B["default"].weight
        assert layer["scaling"] == pytest.approx(live.scaling["default"])
        values = torch.linalg.svdvals((live.scaling["default"] * B @ A).detach())[:2].tolist()
        assert layer["singular_values"] == pytest.approx(values, rel=1e-5)
        assert layer["update_norm"] == pytest.approx(math.hypot(*values), rel=1e-5)
        assert layer["a_norm"] == pytest.approx(A.norm().item(), rel=1e-5)
        assert layer["b_norm"] == pytest.approx(B.norm().item(), rel=1e-5)
        assert layer["relative_norm"] is None
    assert (found["whole"], found["dead"], found["plot"]) == (True, [], None)
    capsys.readouterr()
    assert main(["inspect", str(adapter)]) == 0
    out, err = capsys.readouterr()
    assert "model.layers.0.self_attn.q_proj" in out
    assert "dead layers 0 of 8" in " ".join(out.split())
    assert err == ""


def test_an_adapter_on_its_base(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = adapter.parent / "base"
    found = _json(capsys, "inspect", str(adapter), "--model", str(base))
    weights = load_model(base).state_dict()
    for layer in found["layers"]:
        norm = weights[f"{layer['path']}.weight"].norm().item()
        assert layer["relative_norm"] == pytest.approx(layer["update_norm"] / norm, rel=1e-5)


def test_an_update_that_depends_on_the_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_model(chat.saved(tmp_path / "base"))
    adapted = get_peft_model(base, LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    models.randomise(adapted)
    adapted.save_pretrained(tmp_path / "dora")
    assert main(["inspect", str(tmp_path / "dora")]) == 0
    assert "Name the base with --model" in capsys.readouterr().err
    assert not _json(capsys, "inspect", str(tmp_path / "dora"))["whole"]
    found = _json(capsys, "inspect", str(tmp_path / "dora"), "--model", str(tmp_path / "base"))
    assert found["whole"]
    for layer in found["layers"]:
        with torch.no_grad():
            change = adapted.base_model.layers[layer["path"]].change("default")
        assert layer["update_norm"] == pytest.approx(change.norm().item(), rel=1e-5)
        assert layer["singular_values"][:5] == pytest.approx(torch.linalg.svdvals(change)[:5].tolist(), rel=1e-5)


def test_dead_layers_are_told(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = adapter / "best" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    dead = {"model.layers.0.self_attn.q_proj": 0.0, "model.layers.1.self_attn.v_proj": 1e-6}
    for name, factor in dead.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] *= factor
    safetensors.torch.save_file(tensors, path)
    assert main(["inspect", str(adapter)]) == 0
    out, err = capsys.readouterr()
    assert "dead layers 2 of 8" in " ".join(out.split())
    assert f"Dead layers, which learned next to nothing: {', '.join(dead)}." in err


def test_two_adapters(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = get_peft_model(load_model(tmp_path / "base"), LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    models.randomise(other)
    other.save_pretrained(tmp_path / "other")
    found = _json(capsys, "inspect", str(adapter), "--against", str(tmp_path / "other"))
    assert {layer["path"].rpartition(".")[2] for layer in found["layers"]} == {"q_proj"}
    assert {path.rpartition(".")[2] for path in found["only_second"]} == {"up_proj"}
    assert found["layers"][0]["ranks"] == [2, 3]
    assert len(found["layers"][0]["angles_in"]) == 2
    same = _json(capsys, "inspect", str(adapter), "--against", str(adapter))
    assert same["cosine"] == pytest.approx(1)
    assert same["phi_in"] == pytest.approx(1)
    assert main(["inspect", str(adapter), "--against", str(tmp_path / "other")]) == 0
    assert "cosine of all layers together" in capsys.readouterr().out


@pytest.mark.parametrize("against", [False, True])
def test_a_picture(adapter: Path, tmp_path: Path, against: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", str(adapter), *(["--against", str(adapter)] if against else [])]
    picture = tmp_path / "map.png"
    assert _json(capsys, *arguments, "--plot", str(picture))["plot"] == str(picture)
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert main([*arguments, "--plot", str(picture)]) == 2
    assert "exists already" in capsys.readouterr().err
    picture.write_bytes(b"old")
    assert main([*arguments, "--plot", str(picture), "--force"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot", "map.jpg"], "a name that ends in .png"),
        (["--force"], "--force replaces the picture of --plot"),
        (["--against", "/no/such"], "There is no folder '/no/such'"),
        (["--model", "/no/such"], "There is no folder '/no/such'"),
    ],
)
def test_flags_that_cannot_be(
    adapter: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(adapter), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--plot", "x.png"], ["--against", "x"], ["--model", "x"], ["--force"]])
def test_flags_about_an_adapter_have_no_meaning_on_a_model(
    model: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(model), *flags]) == 2
    assert f"{flags[0]} is about an adapter" in capsys.readouterr().err


def test_an_untrained_adapter_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get_peft_model(chat.model(), LoraConfig()).save_pretrained(tmp_path / "fresh")
    assert main(["inspect", str(tmp_path / "fresh")]) == 0
    assert "Every update is zero" in capsys.readouterr().err


def test_flags_have_no_meaning_on_an_adapter(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(adapter), "--r", "4"]) == 2
    assert "its config is fixed" in capsys.readouterr().err
