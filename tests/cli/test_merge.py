"""``veneer merge``: what it writes is a plain model with the adapter's outputs, or nothing at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from tests import chat, models
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
    assert report["streamed"]
    assert report["peak_memory"] > 0
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
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


@pytest.mark.parametrize("verify", [True, False])
def test_a_model_in_several_files_stays_in_them(
    model: Path, tmp_path: Path, verify: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(model, tmp_path / "adapter")
    load_model(model).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    load_tokenizer(model).save_pretrained(tmp_path / "parts")
    (tmp_path / "parts" / "preprocessor_config.json").write_text("{}")
    flag = "--verify" if verify else "--no-verify"
    assert _merge(tmp_path / "parts", tmp_path / "merged", adapter, more=(flag, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["streamed"]
    assert (report["max_logit_difference"] is not None) == (report["logit_scale"] is not None) == verify
    written = {path.name for path in (tmp_path / "merged").iterdir()}
    assert written == {path.name for path in (tmp_path / "parts").iterdir()}
    loaded = PeftModel.from_pretrained(load_model(model), adapter)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "merged")(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(("available", "verified"), [(None, True), (10**12, True), (1000, False)])
def test_what_does_not_fit_into_memory_twice_is_not_verified(
    model: Path,
    tmp_path: Path,
    available: int | None,
    verified: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("veneer.cli.env.memory", lambda: {"total": available, "available": available})
    adapter = trained(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert _merge(model, tmp_path / "merged", adapter) == 0
    out, err = capsys.readouterr()
    assert ("verified" in out) != verified
    assert ("Not verified: the model has 0.0 GB and 0.0 GB of memory are free" in err) != verified


@pytest.mark.parametrize("verify", [None, True, False])
def test_files_that_are_not_the_models_parameters_are_merged_in_memory(
    tmp_path: Path, verify: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.make("vit").save_pretrained(tmp_path / "vit")
    base = load_model(tmp_path / "vit", auto_class="AutoModelForImageClassification")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="IMAGE_CLASSIFICATION"))
    models.randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.warns(
        UserWarning, match=r"tensor by tensor: transformers converts .* The whole model is loaded instead"
    ):
        report = verb.merge_into_folder(
            tmp_path / "vit", [str(tmp_path / "adapter")], tmp_path / "merged", verify=verify
        )
    assert not report.streamed
    assert (report.max_logit_difference is None) == (verify is False)
    loaded = load_model(tmp_path / "merged", auto_class="AutoModelForImageClassification")
    given = models.batch("vit")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits, adapted.eval()(**given).logits)


def test_an_input_that_cannot_be_made_up_needs_no_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.WhisperForConditionalGeneration, "main_input_name", "smells")
    models.make("whisper").save_pretrained(tmp_path / "whisper")
    base = load_model(tmp_path / "whisper", auto_class="AutoModelForSpeechSeq2Seq")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SPEECH_SEQ_2_SEQ"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert _merge(tmp_path / "whisper", tmp_path / "merged", tmp_path / "adapter") == 2
    assert "--no-verify" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="no tokenizer"):
        verb.merge_into_folder(tmp_path / "whisper", [str(tmp_path / "adapter")], tmp_path / "merged", verify=False)


def test_several_adapters_add_up(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = trained(model, tmp_path / "one"), trained(model, tmp_path / "two", seed=1)
    assert _merge(model, tmp_path / "merged", one, two, more=("--json",)) == 0
    assert json.loads(capsys.readouterr().out)["adapters"] == ["one", "two"]


def test_force_replaces_an_earlier_merge_and_nothing_else(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = trained(model, tmp_path / "one"), trained(model, tmp_path / "two", seed=1)
    output = tmp_path / "merged"
    assert _merge(model, output, one) == 0
    (output / "old.txt").write_text("of the earlier merge")
    before = load_model(output).state_dict()
    assert _merge(model, output, two, more=("--force",)) == 0
    after = load_model(output).state_dict()
    assert not torch.equal(
        before["model.layers.0.self_attn.q_proj.weight"], after["model.layers.0.self_attn.q_proj.weight"]
    )
    assert not (output / "old.txt").exists()
    capsys.readouterr()
    for name, message in (("one", "is to be merged"), ("tiny", "is to be merged"), ("other", "no model's folder")):
        (tmp_path / "other").mkdir(exist_ok=True)
        assert _merge(model, tmp_path / name, one, more=("--force",)) == 2
        assert message in capsys.readouterr().err
    assert _merge(model, tmp_path, one, more=("--force",)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "one", "other", "tiny", "two"]


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
