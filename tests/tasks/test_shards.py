"""The weight files of a pretrained model: which of their tensors is which parameter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from tests import models
from veneer.core.errors import NotStreamableError, UsageError
from veneer.tasks.loading import load_model
from veneer.tasks.shards import save_configs, shards, skeleton, weight_files

CAUSAL = "AutoModelForCausalLM"


def saved(folder: Path, kind: str = "llama", size: str = "4KB") -> Path:
    models.make(kind).save_pretrained(folder, max_shard_size=size)
    return folder


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "opt"])
@pytest.mark.parametrize("size", ["4KB", "1MB"])
def test_every_tensor_of_every_file(tmp_path: Path, kind: str, size: str) -> None:
    folder = saved(tmp_path / "base", kind, size)
    model = skeleton(folder, auto_class=CAUSAL)
    assert all(parameter.is_meta for parameter in model.parameters())
    found = shards(model, weight_files(folder))
    assert [shard.path.name for shard in found] == sorted(path.name for path in folder.glob("*.safetensors"))
    loaded = dict(load_model(folder, auto_class=CAUSAL).named_parameters(remove_duplicate=False))
    seen = set()
    for shard in found:
        for key, tensor in safetensors.torch.load_file(shard.path).items():
            assert torch.equal(loaded[shard.names[key]], tensor)
            seen.add(shard.names[key])
    assert loaded.keys() - seen == (
        {"lm_head.weight"} if loaded["lm_head.weight"].data_ptr() and kind != "llama" else set()
    )


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_a_skeleton_has_the_dtypes_of_the_loaded_model(tmp_path: Path, dtype: str) -> None:
    models.make("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    empty, loaded = skeleton(tmp_path, auto_class=CAUSAL, dtype=dtype), load_model(tmp_path, dtype=dtype)
    assert {n: p.dtype for n, p in empty.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}


def test_the_prefix_of_the_body_is_added_and_taken_off(tmp_path: Path) -> None:
    body, head = saved(tmp_path / "body", "bert-body"), saved(tmp_path / "head", "bert")
    with pytest.warns(UserWarning, match="has no weights for classifier"):
        model = skeleton(body, auto_class="AutoModelForSequenceClassification")
    (added,) = {tuple(sorted(s.names.items())) for s in shards(model, weight_files(body)[:1])}
    assert all(name == f"bert.{key}" for key, name in added)
    with pytest.warns(UserWarning, match="has no place for classifier"):
        model = skeleton(head, auto_class="AutoModel")
    names = [pair for shard in shards(model, weight_files(head)) for pair in shard.names.items()]
    assert all(key == f"bert.{name}" for key, name in names)
    assert not any("classifier" in key for key, _ in names)


def test_files_that_cannot_be_read_one_by_one(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(NotStreamableError, match="quantised"):
        skeleton(folder, auto_class=CAUSAL)
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(NotStreamableError, match="weight files of its own"):
        skeleton(folder, auto_class=CAUSAL)
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(NotStreamableError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        weight_files(folder)


def test_tensors_that_transformers_converts(tmp_path: Path) -> None:
    with pytest.raises(NotStreamableError, match="converts the tensors of a ViTForImageClassification"):
        skeleton(saved(tmp_path / "vit", "vit"), auto_class="AutoModelForImageClassification")


@pytest.mark.parametrize("name", ["../base/model-00001-of-00002.safetensors", "missing.safetensors"])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "base")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(UsageError, match="not in that folder"):
        weight_files(folder)


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    model = skeleton(folder, auto_class=CAUSAL)
    files = weight_files(folder)
    with pytest.raises(NotStreamableError, match="twice"):
        shards(model, [*files, files[0]])
    tensors = safetensors.torch.load_file(files[0])
    name = next(iter(tensors))
    safetensors.torch.save_file({name: tensors[name], name.removeprefix("model."): tensors[name].clone()}, files[0])
    with pytest.raises(NotStreamableError, match="twice"):
        shards(model, files[:1])


def test_configs_are_those_of_save_pretrained(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    save_configs(skeleton(folder, auto_class=CAUSAL, dtype="bfloat16"), tmp_path)
    load_model(folder, dtype="bfloat16").save_pretrained(tmp_path / "wanted")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((tmp_path / "wanted" / name).read_text())
    assert transformers.AutoConfig.from_pretrained(tmp_path).dtype is torch.bfloat16


def test_experts_that_are_stored_apart_and_used_together(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(NotStreamableError, match="converts the tensors of a MixtralForCausalLM"):
        skeleton(tmp_path, auto_class=CAUSAL)


def test_a_model_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(folder / file))
    assert {path.parent for path in weight_files("someone/model")} == {folder}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(UsageError, match="someone/model"):
        weight_files("someone/model")
