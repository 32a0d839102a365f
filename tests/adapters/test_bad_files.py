"""Every way that an adapter's folder may be wrong or hostile: one sentence, the model as it was, an exit code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import chat
from tests.adapters.snapshot import assert_same, snapshot
from veneer import LoraConfig, PeftModel, VeneerError, VeraConfig, get_peft_model
from veneer.cli.main import main
from veneer.tasks.loading import load_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat.saved(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def good(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "good"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[5, 6])
    adapted = get_peft_model(load_model(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return apply


def fields(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **values}))

    return apply


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / CONFIG).write_text(content) and None


def cut(share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)])

    return apply


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def linked(name: str) -> Callable[[Path], None]:
    """The file is a symbolic link to one outside of the folder."""

    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"outside-{name}")
        (folder / name).symlink_to(folder.parent / f"outside-{name}")

    return apply


def looping(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return apply


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda held: held.update({key: tensor})


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    # tensors
    "misshapen": (tensors(put(FIRST, torch.zeros(3, 3))), r"shape \(3, 3\), expected \(2, 32\)"),
    "flat": (tensors(put(FIRST, torch.zeros(64))), r"shape \(64,\), expected"),
    "a single number": (tensors(put(FIRST, torch.tensor(1.0))), r"shape \(\), expected"),
    "empty": (tensors(put(FIRST, torch.zeros(0, 32))), r"shape \(0, 32\), expected"),
    "no tensors at all": (tensors(lambda held: held.clear()), "is missing"),
    "not a number": (tensors(put(FIRST, torch.full((2, 32), torch.nan))), "not finite"),
    "infinite": (tensors(put(FIRST, torch.full((2, 32), -torch.inf))), "not finite"),
    "whole numbers": (tensors(put(FIRST, torch.ones(2, 32, dtype=torch.int32))), "holds torch.int32"),
    "truth values": (tensors(put(FIRST, torch.ones(2, 32, dtype=torch.bool))), "holds torch.bool"),
    "complex": (tensors(put(FIRST, torch.ones(2, 32, dtype=torch.complex64))), "holds torch.complex64"),
    "missing": (tensors(lambda held: held.pop(FIRST)), "lora_A.weight is missing"),
    "one more": (tensors(put(FIRST.replace("q_proj", "k_proj"), torch.zeros(2, 32))), "has no place"),
    "a key that climbs": (tensors(put("../../../etc/passwd", torch.zeros(1))), "has no place"),
    "a key that is absolute": (tensors(put("/etc/passwd", torch.zeros(1))), "has no place"),
    "an empty key": (tensors(put("", torch.zeros(1))), "has no place"),
    "a key of the base": (tensors(put("base_model.model.model.norm.weight", torch.zeros(32))), "has no place"),
    "a key into the machinery": (tensors(put(f"{FIRST}.__class__", torch.zeros(1))), "has no place"),
    "a variant of its own": (tensors(put(FIRST.replace("lora_A", "lora_Z"), torch.zeros(2))), "has no place"),
    "misshapen rows": (tensors(put(ROWS, torch.zeros(3, 32))), r"shape \(3, 32\), expected \(2, 32\)"),
    # numbers in the config
    "larger than its config says": (fields(r=1), r"shape \(2, 32\), expected \(1, 32\)"),
    "smaller than its config says": (fields(r=10**18), "expected"),
    "huge rank_pattern": (fields(rank_pattern={"q_proj": 10**18}), "expected"),
    "huge rank_pattern with DoRA": (fields(rank_pattern={"q_proj": 10**18}, use_dora=True), "expected|rank"),
    "no rank": (fields(r=0), "at least 1"),
    "negative rank": (fields(r=-8), "at least 1"),
    "half a rank": (fields(r=1.5), "whole number"),
    "rank of text": (fields(r="8"), "whole number"),
    "negative rank for one": (fields(rank_pattern={"q_proj": -1}), "at least 1"),
    "huge rank of what layers share": (fields(peft_type="VERA", r=10**9), "does not fit|does not know"),
    "rank_pattern of a list": (fields(rank_pattern=["q_proj"]), "expected a mapping"),
    "rank_pattern that is no expression": (fields(rank_pattern={"(": 2}), "not a regular expression"),
    "alpha of zero": (fields(lora_alpha=0), "above 0"),
    "alpha without end": (fields(lora_alpha=float("inf")), "above 0"),
    "alpha that is no number": (fields(lora_alpha=float("nan")), "above 0"),
    "dropout of one": (fields(lora_dropout=1.0), "below 1"),
    "targets of numbers": (fields(target_modules=[1]), "list of module names"),
    "targets that are not there": (fields(target_modules=["nothing"]), "does not fit this model|matches no module"),
    "tokens that are not there": (fields(trainable_token_indices=[5, 10**6]), "resize_token_embeddings"),
    "tokens beyond all numbers": (fields(trainable_token_indices=[5, 10**30]), "token ids"),
    "invocation beyond all numbers": (fields(alora_invocation_tokens=[10**30]), "token ids"),
    "layers beyond all models": (fields(layer_replication=[[0, 10**12]]), "layers"),
    "layers without end": (fields(layer_replication=[[0, 2]] * 6000), "layers"),
    # what it is
    "unknown type": (fields(peft_type="TELEPATHY"), "TELEPATHY"),
    "type of a number": (fields(peft_type=7), "peft_type"),
    "another type": (fields(peft_type="ADALORA"), "."),
    "unknown field": (fields(use_magic=True), "use_magic"),
    "refused field": (fields(kasa_config={"beta": 0.1}), "kasa_config"),
    "unknown start": (fields(init_lora_weights="magic"), "init_lora_weights"),
    "unknown task": (fields(task_type="MAGIC"), "MAGIC"),
    "task of a number": (fields(task_type=3), "3"),
    # files
    "config of a list": (text("[]"), "holds a JSON list"),
    "config of nothing": (text("null"), "holds a JSON NoneType"),
    "config of a text": (text('"lora"'), "holds a JSON str"),
    "config that is empty": (text(""), "not readable as JSON"),
    "config that ends early": (text('{"r": 8'), "not readable as JSON"),
    "config without bottom": (text("[" * 100_000), "not readable as JSON"),
    "config with a number without end": (text('{"r": ' + "9" * 5000 + "}"), "not readable as JSON"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "adapter_model.safetensors"),
    "weights that are empty": (cut(0), "not a complete safetensors file"),
    "weights cut in the header": (cut(0.1), "not a complete safetensors file"),
    "weights cut near the end": (cut(0.99), "not a complete safetensors file"),
    "only a pickle": (pickled, "is a pickle"),
    "config from outside": (linked(CONFIG), "symbolic link"),
    "weights from outside": (linked(WEIGHTS), "symbolic link"),
    "weights that are themselves": (looping(WEIGHTS), "symbolic link|has no adapter_model"),
}
cases = pytest.mark.parametrize(("spoil", "message"), CASES.values(), ids=CASES)


@cases
def test_loading_leaves_the_model_as_it_was(
    spoil: Callable[[Path], Any], message: str, model: Path, folder: Path
) -> None:
    spoil(folder)
    base = load_model(model)
    before = snapshot(base)
    with pytest.raises(VeneerError, match=message) as caught:
        PeftModel.from_pretrained(base, folder)
    assert_same(before, snapshot(base))
    said = str(caught.value)
    assert said.endswith((".", "?"))
    assert "\n" not in said
    assert len(said) < 2000

    adapted = get_peft_model(base, LoraConfig(r=3, target_modules=["v_proj"]), "other")
    before = snapshot(adapted)
    with pytest.raises(VeneerError, match=message):
        adapted.load_adapter(folder, "new")
    assert_same(before, snapshot(adapted))
    assert list(adapted.peft_config) == ["other"]


SHORT = ("--prompt", "red", "--max-new-tokens", "1")
VERBS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "merge": lambda m, a, out: ["merge", "--model", str(m), "--adapter", str(a), "--output", str(out)],
    "generate": lambda m, a, out: ["generate", "--model", str(m), "--adapter", str(a), *SHORT],
    "convert": lambda m, a, out: ["convert", str(a), "--model", str(m), "--output", str(out)],
}
READERS: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "inspect": lambda m, a, out: ["inspect", str(a)],
    "resize": lambda m, a, out: ["resize", str(a), "--r", "1", "--output", str(out)],
    "export": lambda m, a, out: ["export", str(a), "--check", "vllm"],
}


# Every case for one command that loads, and one of each kind for the others.
FEW = (
    "misshapen",
    "missing",
    "no rank",
    "unknown type",
    "config of a list",
    "weights cut near the end",
    "only a pickle",
)


@pytest.mark.parametrize(
    ("verb", "case"), [("merge", case) for case in CASES] + [(v, case) for v in ("generate", "convert") for case in FEW]
)
def test_commands_that_load_it_say_so_and_write_nothing(
    verb: str, case: str, model: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    CASES[case][0](folder)
    code = main(VERBS[verb](model, folder, tmp_path / "out"))
    _, err = capfd.readouterr()
    assert code in (1, 2), err
    assert "error: " in err
    assert "Unexpected error" not in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", READERS)
@cases
def test_commands_that_read_its_files_never_break(
    verb: str,
    spoil: Callable[[Path], Any],
    message: str,
    model: Path,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Without the model they cannot know everything; what they do see they refuse in one sentence."""
    spoil(folder)
    code = main(READERS[verb](model, folder, tmp_path / "out"))
    _, err = capfd.readouterr()
    assert code in (0, 1, 2), err
    assert "Unexpected error" not in err
    assert "Traceback" not in err
    if code:
        assert not (tmp_path / "out").exists()


def test_the_good_folder_is_good(model: Path, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    PeftModel.from_pretrained(load_model(model), good)
    for verb, command in {**VERBS, **READERS}.items():
        # The one answer that is no: vLLM does not take trained rows.
        assert main(command(model, good, tmp_path / verb)) == int(verb == "export"), capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["../escaped", "a/b", "a\\b", "..", ".", "", "/absolute", "a.b", "a\nb", "é/..", "C:x"]
)
def test_adapter_names_that_are_paths(name: str, model: Path, good: Path) -> None:
    base = load_model(model)
    before = snapshot(base)
    with pytest.raises(VeneerError, match="cannot name an adapter"):
        PeftModel.from_pretrained(base, good, name)
    with pytest.raises(VeneerError, match="cannot name an adapter"):
        get_peft_model(base, LoraConfig(target_modules=["q_proj"]), name)
    assert_same(before, snapshot(base))


def test_links_that_stay_inside_and_the_hubs_cache_are_read(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "real").mkdir()
    (folder / WEIGHTS).rename(folder / "real" / "x")
    (folder / WEIGHTS).symlink_to(Path("real") / "x")
    PeftModel.from_pretrained(load_model(model), folder)
    whole = tmp_path / "link"
    whole.symlink_to(folder)
    PeftModel.from_pretrained(load_model(model), whole)
    # As huggingface_hub lays out what it downloads.
    snapshots, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshots.mkdir(parents=True)
    blobs.mkdir()
    for name in (WEIGHTS, CONFIG):
        shutil.copy(folder / name, blobs / name[:9])
        (snapshots / name).symlink_to(Path("../../blobs") / name[:9])
    PeftModel.from_pretrained(load_model(model), snapshots)


def test_saving_over_a_link_does_not_write_through_it(model: Path, folder: Path) -> None:
    outside = folder.parent / "precious"
    outside.write_bytes(b"precious")
    for name in (WEIGHTS, CONFIG, "README.md"):
        (folder / name).unlink(missing_ok=True)
        os.symlink(outside, folder / name)
    get_peft_model(load_model(model), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    assert outside.read_bytes() == b"precious"
    assert not (folder / WEIGHTS).is_symlink()
    PeftModel.from_pretrained(load_model(model), folder)


def test_nothing_of_the_folder_is_run(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither code beside the adapter nor a pickle is touched."""
    (folder / "modeling_evil.py").write_text("raise SystemExit('run')")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    assert isinstance(PeftModel.from_pretrained(load_model(model), folder), nn.Module)


@pytest.mark.parametrize("save_projection", [True, False])
def test_projections_of_a_huge_rank_are_never_drawn(save_projection: bool, model: Path, tmp_path: Path) -> None:
    config = VeraConfig(r=4, target_modules=["q_proj"], save_projection=save_projection)
    get_peft_model(load_model(model), config).save_pretrained(tmp_path)
    fields(r=10**15)(tmp_path)
    base = load_model(model)
    before = snapshot(base)
    with pytest.raises(VeneerError, match=r"has shape \(4,\), expected \(1000000000000000,\)"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same(before, snapshot(base))
