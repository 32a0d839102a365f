"""Merging tensor by tensor: every tensor is that of the merge in memory, and one tensor is all that is held."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from tests import models
from veneer import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from veneer.adapters import files, streaming
from veneer.core.errors import (
    AdapterFileError,
    BaseMismatchWarning,
    DiskError,
    MergeError,
    NotStreamableError,
    UsageError,
)
from veneer.tasks.loading import load_model
from veneer.tasks.shards import save_configs, shards, skeleton, weight_files

AUTO = {
    "gpt2": "AutoModelForCausalLM",
    "opt": "AutoModelForCausalLM",
    "gemma": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "llama-tied": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "bert-body": "AutoModel",
    "distilbert": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
}
BIAS = {"lora_bias": True, "bias": "all"}


def saved(folder: Path, kind: str, *, size: str = "4KB", dtype: torch.dtype = torch.float32) -> Path:
    """A base model in several files."""
    models.make(kind, dtype=dtype).save_pretrained(folder, max_shard_size=size)
    return folder


def trained(
    base: Path,
    folder: Path,
    kind: str,
    *,
    seed: int = 11,
    family: type[PeftConfig] = LoraConfig,
    r: int = 2,
    **config: Any,
) -> Path:
    """An adapter that changes the base, with all that it trains beside its factors moved too."""
    adapted = get_peft_model(load_model(base, auto_class=AUTO[kind], dtype="auto"), family(r=r, **config))
    models.randomise(adapted, seed=seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "vera_lambda" in name:
                parameter += 0.5
    with torch.no_grad():
        for parameter in adapted.base_model.biases.values("default").values() if config.get("bias") else ():
            parameter += 0.5
    adapted.save_pretrained(folder)
    return folder


def in_memory(
    base: Path, adapters: Iterable[Path], folder: Path, kind: str, *, dtype: str = "auto"
) -> dict[str, Tensor]:
    """The tensors that a merge in memory saves."""
    adapted: PeftModel | None = None
    names = []
    for number, adapter in enumerate(adapters):
        names.append(f"a{number}")
        if adapted is None:
            model = load_model(base, auto_class=AUTO[kind], dtype=dtype)
            adapted = PeftModel.from_pretrained(model, adapter, names[0])
        else:
            adapted.load_adapter(adapter, names[-1])
    assert adapted is not None
    adapted.set_adapter(names)
    adapted.merge_and_unload().save_pretrained(folder)
    return tensors(folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def prepared(base: Path, adapters: Iterable[Path], kind: str, *, dtype: str = "auto") -> streaming.StreamingMerge:
    empty = skeleton(base, auto_class=AUTO[kind], dtype=dtype)
    named = {f"a{number}": files.read(adapter) for number, adapter in enumerate(adapters)}
    return streaming.StreamingMerge(empty, named, shards(empty, weight_files(base)))


def streamed(
    base: Path, adapters: Iterable[Path], folder: Path, kind: str, *, dtype: str = "auto"
) -> dict[str, Tensor]:
    """The tensors that a merge tensor by tensor leaves."""
    merge = prepared(base, adapters, kind, dtype=dtype)
    merge.write(folder)
    save_configs(merge.adapted.model, folder)
    return tensors(folder)


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def compare(tmp_path: Path, base: Path, adapters: list[Path], kind: str, *, dtype: str = "auto") -> None:
    """Both merges give the same tensors and configs, and the one tensor by tensor changed more than nothing."""
    wanted = in_memory(base, adapters, tmp_path / "memory", kind, dtype=dtype)
    found = streamed(base, adapters, tmp_path / "streamed", kind, dtype=dtype)
    assert_same(found, wanted)
    before = tensors(base)
    assert any(name not in before or not torch.equal(before[name], tensor) for name, tensor in found.items())
    for name in ("config.json", "generation_config.json"):
        paths = [tmp_path / way / name for way in ("streamed", "memory")]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            assert json.loads(paths[0].read_text()) == json.loads(paths[1].read_text())


# Not "vit": transformers renames its tensors.
@pytest.mark.parametrize("kind", [kind for kind in models.MODELS if kind != "vit"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_every_tensor_is_that_of_the_merge_in_memory(tmp_path: Path, kind: str, dtype: str) -> None:
    base = saved(tmp_path / "base", kind)
    adapter = trained(base, tmp_path / "adapter", kind, target_modules="all-linear")
    compare(tmp_path, base, [adapter], kind, dtype=dtype)
    assert {path.name for path in (tmp_path / "streamed").glob("*.safetensors*")} == {
        path.name for path in base.glob("*.safetensors*")
    }


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_narrow_base_keeps_its_dtype(tmp_path: Path, stored: torch.dtype) -> None:
    base = saved(tmp_path / "base", "llama", dtype=stored)
    adapter = trained(base, tmp_path / "adapter", "llama")
    compare(tmp_path, base, [adapter], "llama")
    assert {tensor.dtype for tensor in tensors(tmp_path / "streamed").values()} == {stored}


def test_several_adapters_add_up(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "opt")
    one = trained(base, tmp_path / "one", "opt", target_modules=["q_proj", "fc1"], lora_bias=True)
    two = trained(base, tmp_path / "two", "opt", target_modules=["q_proj", "v_proj"], seed=5, use_rslora=True, **BIAS)
    compare(tmp_path, base, [one, two], "opt")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"target_modules": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
        ("llama-tied", {"target_modules": ["q_proj"]}),
        ("llama-tied", {"target_modules": ["embed_tokens"]}),
        ("llama-tied", {"target_modules": ["lm_head"]}),
        ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llama-tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (
            "llama-tied",
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("opt", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("opt", {"target_modules": ["q_proj", "fc2"], **BIAS}),
        ("gpt2", {"target_modules": ["c_attn"], **BIAS}),
        ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        ("whisper", {"target_modules": ["q_proj"], "bias": "all"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not reach .* which share its weight:UserWarning")
def test_all_that_an_adapter_may_bring(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    base = saved(tmp_path / "base", kind)
    compare(tmp_path, base, [trained(base, tmp_path / "adapter", kind, **config)], kind)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        (LoraConfig, {"use_dora": True}),
        (LoraConfig, {"use_rslora": True, "alpha_pattern": {"o_proj": 3}, "rank_pattern": {"q_proj": 1}}),
        (LoraConfig, {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
        (AdaLoraConfig, {"total_step": 10, "r": 8, "init_r": 3, "target_r": 2}),
        (VeraConfig, {"r": 3}),
        (VeraConfig, {"r": 3, "save_projection": False}),
    ],
)
def test_every_family(tmp_path: Path, family: type[PeftConfig], config: dict[str, Any], stored: torch.dtype) -> None:
    base = saved(tmp_path / "base", "llama", dtype=stored)
    config = {"target_modules": ["q_proj", "o_proj"], **config}
    compare(tmp_path, base, [trained(base, tmp_path / "adapter", "llama", family=family, **config)], "llama")


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_an_adapter_that_stands_on_another_weight(tmp_path: Path, start: str) -> None:
    """Whatever such a file can be merged from, the result is that of memory, or the files alone are refused."""
    base = saved(tmp_path / "base", "llama")
    config = {"init_lora_weights": start, "target_modules": ["q_proj"]}
    if start == "loftq":
        config["loftq_config"] = {"loftq_bits": 4}
    adapter = trained(base, tmp_path / "adapter", "llama", **config)
    wanted = in_memory(base, [adapter], tmp_path / "memory", "llama")
    try:
        merge = prepared(base, [adapter], "llama")
    except NotStreamableError as refusal:
        assert "made from the base's" in str(refusal)  # noqa: PT017
        return
    merge.write(tmp_path / "streamed")
    assert_same(tensors(tmp_path / "streamed"), wanted)


def test_experts_that_are_stored_as_one_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUTO, "experts", "AutoModelForCausalLM")
    config = transformers.GptOssConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
    )
    transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="4KB")
    names = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    adapter = trained(tmp_path / "base", tmp_path / "adapter", "experts", **names)
    compare(tmp_path, tmp_path / "base", [adapter], "experts")
    merged, before = tensors(tmp_path / "streamed"), tensors(tmp_path / "base")
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.{name}"
        assert not torch.equal(merged[key], before[key])


def test_a_weight_and_its_bias_in_different_files(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "opt", size="50KB")
    every = tensors(base)
    shutil.rmtree(base)
    models.make("opt").config.save_pretrained(base)
    parts = {
        "model-00001-of-00002.safetensors": {n: t for n, t in every.items() if n.endswith("bias")},
        "model-00002-of-00002.safetensors": {n: t for n, t in every.items() if not n.endswith("bias")},
    }
    for name, part in parts.items():
        safetensors.torch.save_file(part, base / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    (base / streaming.INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    compare(tmp_path, base, [trained(base, tmp_path / "adapter", "opt", **BIAS)], "opt")
    index = json.loads((tmp_path / "streamed" / streaming.INDEX_NAME).read_text())
    assert index["weight_map"] == weight_map
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in every.values()),
        "total_size": sum(tensor.numel() * 4 for tensor in every.values()),
    }


@pytest.mark.filterwarnings("ignore:.*has no weights for .*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*has no place for lm_head.*:UserWarning")
def test_a_head_on_the_checkpoint_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The new head comes from the adapter, the old one is left out; a checkpoint of the body has no prefix.
    monkeypatch.setitem(AUTO, "llama", "AutoModelForSequenceClassification")
    base = saved(tmp_path / "base", "llama")
    adapter = trained(base, tmp_path / "adapter", "llama", task_type="SEQ_CLS")
    compare(tmp_path, base, [adapter], "llama")
    assert "score.weight" in tensors(tmp_path / "streamed")
    body = saved(tmp_path / "body", "bert-body")
    shutil.rmtree(tmp_path / "memory")
    shutil.rmtree(tmp_path / "streamed")
    other = trained(body, tmp_path / "other", "bert", task_type="SEQ_CLS", target_modules=["query"])
    compare(tmp_path, body, [other], "bert")


def test_the_body_of_a_checkpoint_with_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUTO, "bert", "AutoModel")
    base = saved(tmp_path / "base", "bert")
    with pytest.warns(UserWarning, match=r"has no place for classifier"):
        compare(tmp_path, base, [trained(base, tmp_path / "adapter", "bert", target_modules=["query"])], "bert")


@pytest.mark.parametrize("ids", [[3, 9], {"lm_head": [5]}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.filterwarnings("ignore:The rows of")
def test_trained_rows_of_embeddings(tmp_path: Path, kind: str, ids: Any) -> None:
    base = saved(tmp_path / "base", kind)
    config = {"target_modules": "all-linear", "trainable_token_indices": ids}
    adapted = get_peft_model(load_model(base, auto_class=AUTO[kind]), LoraConfig(r=2, **config))
    with torch.no_grad():
        for rows in adapted.base_model.tokens.of("default").values():
            rows += 1
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = in_memory(base, [tmp_path / "adapter"], tmp_path / "whole", kind)
    assert_same(streamed(base, [tmp_path / "adapter"], tmp_path / "streamed", kind), wanted)


def test_embeddings_that_the_adapter_brings(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    adapted = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    models.randomise(adapted)
    with torch.no_grad():
        adapted.base_model.original("model.embed_tokens.weight").mul_(2)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.warns(UserWarning, match=r"brings its own model.embed_tokens.weight"):
        compare(tmp_path, base, [tmp_path / "adapter"], "llama")


def test_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tmp_path / "base", "llama")
    merge = prepared(base, [trained(base, tmp_path / "adapter", "llama", target_modules="all-linear")], "llama")
    given: list[weakref.ref[Tensor]] = []
    together: list[int] = []
    files_open: list[int] = [0]
    real = streaming._opened

    class Watched:
        """A weight file that counts how many of the tensors it gave are alive when it is asked for the next."""

        def __init__(self, path: Path) -> None:
            self.file = real(path)

        def __enter__(self) -> Watched:
            files_open.append(files_open[-1] + 1)
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            files_open.append(files_open[-1] - 1)
            self.file.__exit__(*error)

        def metadata(self) -> Any:
            return self.file.metadata()

        def get_tensor(self, key: str) -> Tensor:
            tensor = self.file.get_tensor(key)
            given.append(weakref.ref(tensor))
            together.append(sum(alive() is not None for alive in given))
            return tensor

    monkeypatch.setattr(streaming, "_opened", Watched)
    gc.disable()
    try:
        merge.write(tmp_path / "merged")
    finally:
        gc.enable()
    assert len(given) == len(tensors(base))
    assert max(together) == 1
    assert max(files_open) == 1
    assert all(alive() is None for alive in given)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tmp_path / "base", "llama")
    merge = prepared(base, [trained(base, tmp_path / "adapter", "llama")], "llama")
    real, written = streaming.write_one_by_one, []

    def filling(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(path, *rest)

    monkeypatch.setattr(streaming, "write_one_by_one", filling)
    with pytest.raises(DiskError, match="No space left on device"):
        merge.write(tmp_path / "merged")
    assert len(list((tmp_path / "merged").iterdir())) == 2


def test_a_weight_that_is_computed_is_not_in_the_files(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    adapter = trained(base, tmp_path / "adapter", "llama", target_modules=["q_proj"])
    empty = skeleton(base, auto_class=AUTO["llama"])
    found = shards(empty, weight_files(base))
    merge = streaming.StreamingMerge(empty, {"a": files.read(adapter)}, found)
    layer = next(iter(merge.adapted.layers.values()))
    layer.leaf = "other"
    with pytest.raises(NotStreamableError, match=r"the weight of 'model.layers.0.self_attn.q_proj' is computed"):
        merge._check_complete()


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama", dtype=torch.float16)
    adapted = get_peft_model(load_model(base, dtype="auto"), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.fill_(1e4)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"Merging a0 into 'model.layers.0.self_attn.q_proj.weight' gives values"):
        prepared(base, [tmp_path / "adapter"], "llama").write(tmp_path / "merged")


def test_another_base_is_told_of(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    adapter = trained(base, tmp_path / "adapter", "llama")
    models.make("llama", seed=1).save_pretrained(tmp_path / "other", max_shard_size="4KB")
    with pytest.warns(BaseMismatchWarning, match="its weights differ"):
        prepared(tmp_path / "other", [adapter], "llama")


def test_an_encoder_decoder_is_not_untied(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "t5")
    with pytest.warns(UserWarning, match="does not reach"):
        adapter = trained(base, tmp_path / "adapter", "t5", target_modules=["shared"])
    with pytest.warns(UserWarning, match="does not reach"), pytest.raises(MergeError, match="shares its weight"):
        prepared(base, [adapter], "t5")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"modules_to_save": ["norm"]}, {"modules_to_save": ["norm"]}, "each have their own"),
        ({"modules_to_save": ["norm"]}, {"target_modules": ["norm"]}, "does not fit"),
    ],
)
def test_adapters_that_cannot_be_merged_together(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    base = saved(tmp_path / "base", "llama")
    one = trained(base, tmp_path / "one", "llama", **first)
    if "target_modules" in second:
        two = trained(base, tmp_path / "two", "llama")
        config = json.loads((two / "adapter_config.json").read_text())
        (two / "adapter_config.json").write_text(json.dumps({**config, **second}))
    else:
        two = trained(base, tmp_path / "two", "llama", **second)
    with pytest.raises((UsageError, AdapterFileError), match=message):
        prepared(base, [one, two], "llama")


def test_parameters_that_the_files_do_not_hold(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama")
    adapter = trained(base, tmp_path / "adapter", "llama")
    empty = skeleton(base, auto_class=AUTO["llama"])
    found = shards(empty, weight_files(base))
    with pytest.raises(NotStreamableError, match=r"go tensor by tensor: the files hold no "):
        streaming.StreamingMerge(empty, {"a": files.read(adapter)}, found[1:])


def test_a_shared_parameter_that_is_stored_twice(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama-tied", size="1MB")
    adapter = trained(base, tmp_path / "adapter", "llama-tied")
    every = tensors(base)
    every["lm_head.weight"] = every["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(every, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotStreamableError, match=r"hold both lm_head.weight and model.embed_tokens.weight"):
        prepared(base, [adapter], "llama-tied")
