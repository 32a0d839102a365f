"""Adapter files: whatever is wrong with them gives one clear error, and the model stays as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import models
from tests.adapters.snapshot import assert_same, snapshot
from veneer import (
    AdapterFileError,
    BaseMismatchWarning,
    ConfigError,
    DiskError,
    LoraConfig,
    PeftModel,
    TaskType,
    UsageError,
    VeneerError,
    get_peft_model,
)
from veneer.adapters.files import write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.layers.1.lora_A.weight"


class Small(nn.Module):
    """Two layers and a head: a fraction of a millisecond each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def small() -> Small:
    torch.manual_seed(1)
    return Small()


def make(folder: Path) -> Path:
    config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["head"], init_lora_weights=False)
    get_peft_model(small(), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def refused(folder: Path, error: type[VeneerError] = AdapterFileError, match: str | None = None) -> None:
    """Loading fails with exactly this error, as the first adapter and beside another one, and changes nothing."""
    model = small()
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        PeftModel.from_pretrained(model, folder)
    assert type(caught.value) is error
    assert str(caught.value).endswith((".", "?")), str(caught.value)
    assert_same(before, snapshot(model))

    adapted = get_peft_model(small(), LoraConfig(target_modules=["1"]), "other")
    before = snapshot(adapted)
    with pytest.raises(error):
        adapted.load_adapter(folder, "new")
    assert_same(before, snapshot(adapted))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def reconfigure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


# Broken containers


fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(data=st.data())
def test_truncated_anywhere(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = (good / WEIGHTS).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    target = tmp_path / "cut"
    target.mkdir(exist_ok=True)
    shutil.copy(good / CONFIG, target)
    (target / WEIGHTS).write_bytes(content[:length])
    refused(target, match="safetensors")


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_in_the_header(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((good / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    place = data.draw(st.integers(0, header - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    target = tmp_path / "flipped"
    target.mkdir(exist_ok=True)
    shutil.copy(good / CONFIG, target)
    (target / WEIGHTS).write_bytes(bytes(content))
    model = small()
    before = snapshot(model)
    with warnings.catch_warnings():
        # A bit of the fingerprint: the base seems to be another one.
        warnings.simplefilter("ignore", BaseMismatchWarning)
        try:
            loaded = PeftModel.from_pretrained(model, target)
        except AdapterFileError:
            assert_same(before, snapshot(model))
            return
    # It hit the metadata or a space: then every tensor is what it was.
    right = PeftModel.from_pretrained(small(), good).state_dict()
    assert all(torch.equal(tensor, right[key]) for key, tensor in loaded.state_dict().items())


@fuzz
@given(order=st.permutations(range(6)), extra=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_order_and_metadata_do_not_matter(good: Path, tmp_path: Path, order: list[int], extra: dict[str, str]) -> None:
    tensors = list(load_file(good / WEIGHTS).items())
    assert len(tensors) == 6
    target = tmp_path / "reordered"
    target.mkdir(exist_ok=True)
    shutil.copy(good / CONFIG, target)
    save_file(dict(tensors[i] for i in order), target / WEIGHTS, metadata=extra)
    loaded, right = (PeftModel.from_pretrained(small(), path).state_dict() for path in (target, good))
    assert loaded.keys() == right.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in right.items())


@settings(fuzz, max_examples=40)
@given(content=st.binary(max_size=200))
def test_any_other_bytes(good: Path, tmp_path: Path, content: bytes) -> None:
    target = tmp_path / "bytes"
    target.mkdir(exist_ok=True)
    shutil.copy(good / CONFIG, target)
    (target / WEIGHTS).write_bytes(content)
    refused(target)


@settings(fuzz, max_examples=60)
@given(content=st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), st.lists, max_leaves=5))
def test_any_value_of_any_field(good: Path, tmp_path: Path, content: Any) -> None:
    """A config of the wrong types is refused by name or means what it says; nothing else ever comes out."""
    fields = json.loads((good / CONFIG).read_text())
    target = tmp_path / "config"
    target.mkdir(exist_ok=True)
    shutil.copy(good / WEIGHTS, target)
    for name in ("r", "target_modules", "modules_to_save", "rank_pattern", "layers_to_transform", "task_type", "bias"):
        (target / CONFIG).write_text(json.dumps({**fields, name: content}))
        model = small()
        before = snapshot(model)
        try:
            PeftModel.from_pretrained(model, target)
        except VeneerError:
            assert_same(before, snapshot(model))


# Tensors that do not fit


def test_missing_key(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(KEY))
    refused(folder, match=rf"{KEY} is missing")


def test_unexpected_key_names_the_nearest(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({KEY.replace("lora_A", "lora_C"): torch.zeros(2, 4)}))
    refused(folder, match=r"lora_C.weight has no place .*nearest .*lora_[AB]")


def test_key_without_the_prefix(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"layers.1.lora_A.weight": tensors.pop(KEY)}))
    refused(folder, match="is missing")


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (2, 4, 1), (8,), (0, 4), (2, 0), ()], ids=str)
def test_misshapen_tensor(shape: tuple[int, ...], folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({KEY: torch.zeros(shape)}))
    refused(folder, match=r"has shape .*expected \(2, 4\)")


def test_rank_in_the_config_other_than_in_the_tensors(folder: Path) -> None:
    for r in (1, 3, 10**9):
        reconfigure(folder, r=r)
        refused(folder, match="has shape")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite(value: float, dtype: torch.dtype, folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[KEY] = tensors[KEY].to(dtype)
        tensors[KEY][1, 2] = value

    rewrite(folder, spoil)
    refused(folder, match=rf"not finite in {KEY}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_other_kinds_of_numbers(dtype: torch.dtype, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({KEY: tensors[KEY].to(dtype)}))
    refused(folder, match="expected floating-point")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_other_floating_dtypes_load(dtype: torch.dtype, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({KEY: tensors[KEY].to(dtype)}))
    loaded = PeftModel.from_pretrained(small(), folder)
    assert loaded(torch.randn(2, 3)).isfinite().all()


def test_several_problems_are_named_together(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors.pop(KEY)
        tensors["base_model.model.head.weight"] = torch.zeros(1)

    rewrite(folder, spoil)
    refused(folder, match=r"lora_A.weight is missing.*head.weight has shape")


def test_an_adapter_for_another_model_names_its_base(tmp_path: Path) -> None:
    base = models.make("llama")
    base.config._name_or_path = "some/llama"
    get_peft_model(base, LoraConfig()).save_pretrained(tmp_path)
    for other in ("bert", "gpt2", "t5"):
        model = models.make(other)
        before = snapshot(model)
        with pytest.raises(AdapterFileError, match=r"made for 'some/llama'"):
            PeftModel.from_pretrained(model, tmp_path)
        assert_same(before, snapshot(model))


# Folders


def test_pickles_are_not_read(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "exploded"),)

    (folder / WEIGHTS).unlink()
    torch.save({"x": Bomb()}, folder / "adapter_model.bin")
    refused(folder, match="pickle")
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_missing_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    refused(folder, UsageError, match=name)


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", UsageError, match="no folder")
    refused(tmp_path / "a" / "b" / "c", UsageError)
    with pytest.raises(UsageError, match="out of reach"):
        PeftModel.from_pretrained(small(), "someone/some-adapter")
    with pytest.raises(UsageError, match="no folder"):
        PeftModel.from_pretrained(small(), "not a name!")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_folder_where_a_file_should_be(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, UsageError, match=name)


@pytest.mark.parametrize("name", ["../escaped", "a/b", "..", "/absolute", "a.b"])
def test_names_that_escape_the_folder(name: str, folder: Path) -> None:
    adapted = PeftModel.from_pretrained(small(), folder)
    before = snapshot(adapted)
    with pytest.raises(UsageError, match="cannot name"):
        adapted.load_adapter(folder, name)
    with pytest.raises(UsageError, match="no adapter"):
        adapted.save_pretrained(folder, selected_adapters=[name])
    assert_same(before, snapshot(adapted))


# Configs


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"nul", b'"x"', b"\xff\xfe", b'{"r": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000 + b"1"],
    ids=range(8),
)
def test_broken_config(content: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    refused(folder, match=CONFIG)


def test_config_with_fields_that_mean_something_else(folder: Path) -> None:
    for field, value in [("velora_config", {"a": 1}), ("frobnicate", 3), ("r", "2"), ("peft_type", "LOHA")]:
        content = (folder / CONFIG).read_text()
        reconfigure(folder, **{field: value})
        refused(folder, ConfigError, match=field)
        (folder / CONFIG).write_text(content)


def test_config_given_instead_of_the_folders(folder: Path) -> None:
    (folder / CONFIG).unlink()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"], modules_to_save=["head"])
    loaded = PeftModel.from_pretrained(small(), folder, config=config)
    assert loaded.base_model.model.layers[0].scaling["default"] == 1.5


# Writing


def test_what_is_in_a_folder(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    config = json.loads((folder / CONFIG).read_text())
    assert config["inference_mode"] is True
    assert list(config) == sorted(config)


def test_default_at_the_root_and_others_below(tmp_path: Path) -> None:
    adapted = get_peft_model(small(), LoraConfig(r=1, target_modules=["0"]))
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["1"]))
    adapted.save_pretrained(tmp_path / "all")
    assert (tmp_path / "all" / WEIGHTS).is_file()
    assert (tmp_path / "all" / "other" / WEIGHTS).is_file()
    adapted.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["other"]
    loaded = PeftModel.from_pretrained(small(), tmp_path / "all", subfolder="other")
    assert loaded.peft_config["default"].r == 2


def test_the_base_is_named(tmp_path: Path) -> None:
    model = models.make("llama")
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig()).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert str(tmp_path / "base") in (tmp_path / "a" / "README.md").read_text()


def test_saving_over_an_adapter_replaces_it_whole(folder: Path) -> None:
    other = get_peft_model(small(), LoraConfig(r=1, target_modules=["0"]))
    other.save_pretrained(folder)
    assert len(load_file(folder / WEIGHTS)) == 2
    assert PeftModel.from_pretrained(small(), folder).peft_config["default"].r == 1


@pytest.mark.parametrize("half", [0, 1000])
def test_a_full_disk_leaves_the_old_adapter(half: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(tensors: dict[str, Tensor], path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"x" * half)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DiskError, match="No space left"):
        get_peft_model(small(), LoraConfig(target_modules=["0"])).save_pretrained(folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    PeftModel.from_pretrained(small(), folder)


FULL = """
import resource, signal, sys, torch
from veneer import DiskError, LoraConfig, get_peft_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(500, 500)), LoraConfig(target_modules=["0"]))
try:
    model.save_pretrained(sys.argv[1])
except DiskError as error:
    print("refused:", error)
"""


def test_a_disk_that_is_full_for_the_writer_itself(folder: Path) -> None:
    """The tensor writer has an exception class of its own for this."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = subprocess.run([sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: Could not write")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pickles_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pickle"):
        get_peft_model(small(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


def test_a_card_that_somebody_claimed_is_kept(folder: Path) -> None:
    adapted = PeftModel.from_pretrained(small(), folder)
    assert "| rank | 2 on 2 layers |" in (folder / "README.md").read_text()
    adapted.save_pretrained(folder, figures={"held-out loss": "1.9 -> 1.4"})
    assert "| held-out loss | 1.9 -> 1.4 |" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    adapted.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    get_peft_model(small(), LoraConfig(target_modules=["0"])).save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()


def test_nothing_touches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = models.make("llama")
    model.config._name_or_path = "someone/llama"
    adapted = get_peft_model(model, LoraConfig())
    adapted.save_pretrained(tmp_path)
    base = models.make("llama")
    base.config._name_or_path = "someone/llama"
    PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    with pytest.raises(UsageError):
        PeftModel.from_pretrained(models.make("llama"), "someone/adapter")


# Given state dicts, and loading onto a name


def test_a_gathered_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    adapted = get_peft_model(small(), LoraConfig(target_modules=["0", "1"], modules_to_save=["head"], bias="lora_only"))
    full = {key: tensor + 1 for key, tensor in adapted.state_dict().items()}
    adapted.save_pretrained(tmp_path, state_dict=full)
    saved = load_file(tmp_path / WEIGHTS)
    adapted.save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / WEIGHTS)
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[key], plain[key] + 1) for key in plain)
    with pytest.raises(AdapterFileError, match="must be the whole model's"):
        adapted.save_pretrained(tmp_path / "part", state_dict={})
    assert not (tmp_path / "part").exists()


def test_loading_onto_a_name_keeps_its_parameters(folder: Path) -> None:
    adapted = PeftModel.from_pretrained(small(), folder, is_trainable=True)
    parameters = dict(adapted.named_parameters())
    right = {name: p.detach().clone() for name, p in parameters.items()}
    models.randomise(adapted)
    (folder / "trainer_state.json").write_text("{}")
    adapted.load_adapter(folder, "default")
    for name, parameter in adapted.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, right[name])
        assert parameter.requires_grad == (".default." in name)


@pytest.mark.parametrize("field", [{"r": 1}, {"lora_alpha": 99}, {"target_modules": ["0"]}, {"modules_to_save": None}])
def test_loading_onto_a_name_with_another_config_is_refused(
    field: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    config = {"r": 2, "target_modules": ["0", "1"], "modules_to_save": ["head"], **field}
    get_peft_model(small(), LoraConfig(**config)).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "trainer_state.json").write_text("{}")
    adapted = PeftModel.from_pretrained(small(), folder)
    before = snapshot(adapted)
    with pytest.raises(UsageError, match="another config"):
        adapted.load_adapter(tmp_path / "other", "default")
    assert_same(before, snapshot(adapted))


def test_an_adapter_left_on_the_meta_device_is_filled_by_loading(folder: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["head"])
    adapted = get_peft_model(small(), config, low_cpu_mem_usage=True)
    assert adapted.base_model.model.layers[0].lora_A["default"].weight.is_meta
    adapted.load_adapter(folder, "default")
    x = torch.randn(2, 3)
    assert torch.equal(adapted(x), PeftModel.from_pretrained(small(), folder)(x))


def test_unknown_option_is_named(folder: Path) -> None:
    with pytest.raises(UsageError, match="revisoin"):
        PeftModel.from_pretrained(small(), folder, revisoin="main")


# The mark of the base


def loads_silently(model: nn.Module, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(model, folder)


@pytest.fixture(scope="module")
def of_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    config = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["query"], bias="all")
    adapted = get_peft_model(models.make("bert"), config)
    models.randomise(adapted)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_base_in_any_precision(dtype: torch.dtype, of_bert: Path, tmp_path: Path) -> None:
    loads_silently(models.make("bert", dtype=dtype), of_bert)
    get_peft_model(models.make("bert", dtype=dtype), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    loads_silently(models.make("bert"), tmp_path)


def test_a_new_head_is_not_another_base(of_bert: Path) -> None:
    model = models.make("bert")
    nn.init.normal_(model.classifier.weight)
    loads_silently(model, of_bert)


def test_other_weights_warn_and_load(of_bert: Path) -> None:
    with pytest.warns(BaseMismatchWarning, match="its weights differ"):
        PeftModel.from_pretrained(models.make("bert", seed=8), of_bert)


def test_a_lightly_trained_base_warns(of_bert: Path) -> None:
    model = models.make("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight.mul_(1.02)
    with pytest.warns(BaseMismatchWarning):
        PeftModel.from_pretrained(model, of_bert)


def test_another_depth_warns(tmp_path: Path) -> None:
    get_peft_model(models.make("bert"), LoraConfig(target_modules=["layer.0.attention.self.query"])).save_pretrained(
        tmp_path
    )
    model = models.make("bert")
    model.bert.encoder.layer = model.bert.encoder.layer[:1]
    with pytest.warns(BaseMismatchWarning, match="modules or their shapes differ"):
        PeftModel.from_pretrained(model, tmp_path)


def test_saved_from_an_adapted_trained_and_merged_model(tmp_path: Path) -> None:
    adapted = get_peft_model(models.make("llama"), LoraConfig(init_lora_weights=False))
    adapted.merge_adapter()
    adapted.save_pretrained(tmp_path)
    loads_silently(models.make("llama"), tmp_path)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_embeddings_saved_along_are_no_other_base(targets: list[str], tmp_path: Path) -> None:
    adapted = get_peft_model(models.make("llama"), LoraConfig(target_modules=targets))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    loads_silently(models.make("llama"), tmp_path)
    loads_silently(models.make("llama", dtype=torch.bfloat16), tmp_path)


def test_a_resized_vocabulary_is_saved_and_comes_back(tmp_path: Path) -> None:
    base = models.make("llama")
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(models.V + 3)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match="vocabulary was resized"):
        adapted.save_pretrained(tmp_path / "a")
    fresh = type(base).from_pretrained(tmp_path / "base")
    before = snapshot(fresh)
    with pytest.raises(AdapterFileError, match=rf"resize_token_embeddings\({models.V + 3}\)"):
        PeftModel.from_pretrained(fresh, tmp_path / "a")
    assert_same(before, snapshot(fresh))
    fresh.resize_token_embeddings(models.V + 3)
    with pytest.warns(UserWarning, match="replaces"):
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "a")
    inputs = models.batch("llama")
    assert torch.equal(models.output(loaded, inputs), models.output(adapted, inputs))
    adapted.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    assert not [key for key in load_file(tmp_path / "without" / WEIGHTS) if "lora" not in key]


def test_equal_content_has_equal_bytes(tmp_path: Path) -> None:
    metadata = {name: name * 3 for name in ("format", "veneer", "mark", 'naïve "quoted"')}
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16)}
    contents = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        write_tensors(tensors, path, dict(metadata))
        contents.add(path.read_bytes())
    assert len(contents) == 1
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())
