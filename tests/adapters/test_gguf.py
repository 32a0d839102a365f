"""GGUF files, read back with gguf's own reader and brought into transformers' layout by transformers' own loader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from tests.adapters.making import updates
from veneer import DiskError, LoraConfig, PeftModel, UsageError, get_peft_model
from veneer.adapters import files
from veneer.adapters.gguf import write_gguf

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GGUF_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
KINDS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, "llama", True),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, "llama", True),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, "qwen2", False),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, "qwen3", False),
    "gemma": (transformers.GemmaForCausalLM, transformers.GemmaConfig, "gemma", False),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config, "gemma2", False),
    "gemma3_text": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, "gemma3", False),
}


def made(kind: str, folder: Path, *, tied: bool = False, **config: Any) -> PeftModel:
    """A tiny model of 4 heads and 2 for keys, with an adapter on it that is saved."""
    model_class, config_class, _, _ = KINDS[kind]
    base = model_class(
        config_class(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=tied,
            pad_token_id=0,
        )
    )
    adapted = get_peft_model(base, LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ALL, **config}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


def written(model: PeftModel, folder: Path) -> tuple[gguf.GGUFReader, Any]:
    report = write_gguf(files.read(folder), model.get_base_model().config.to_dict(), folder / "adapter.gguf")
    return gguf.GGUFReader(folder / "adapter.gguf"), report


def field(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def in_llama_cpp(reader: gguf.GGUFReader) -> dict[str, Tensor]:
    """The update of each of the base's tensors, scaled as llama.cpp does: alpha over the rank that B has."""
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()).double() for tensor in reader.tensors}
    alpha = float(field(reader, "adapter.lora.alpha"))
    found = {}
    for name in {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        A = A.T if name == "token_embd.weight" else A
        found[name] = (alpha / B.shape[1]) * B @ A
    return found


def in_transformers(found: dict[str, Tensor], model: PeftModel, *, reordered: bool) -> dict[str, Tensor]:
    """The same by the paths of the modules, in the layout that transformers' own reader of GGUF files gives."""
    config = model.get_base_model().config
    processor = LlamaTensorProcessor(
        {key: getattr(config, key) for key in ("num_attention_heads", "num_key_value_heads")}
    )
    names = {f"blk.{n}.{mine}.weight": f"model.layers.{n}.{room}.{theirs}"
             for n in (0, 1) for theirs, mine in GGUF_NAMES.items()
             for room in ["mlp" if mine.startswith("ffn") else "self_attn"]}  # fmt: skip
    names |= {"token_embd.weight": "model.embed_tokens", "output.weight": "lm_head"}
    return {
        names[name]: torch.from_numpy(processor.process(update.numpy(), name).weights) if reordered else update
        for name, update in found.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    model = made(kind, tmp_path)
    reader, report = written(model, tmp_path)
    found = in_transformers(in_llama_cpp(reader), model, reordered=KINDS[kind][3])
    wanted = updates(model)
    assert found.keys() == wanted.keys()
    for path, update in wanted.items():
        torch.testing.assert_close(found[path], update, rtol=1e-5, atol=1e-5, msg=path)
    assert report.architecture == KINDS[kind][2]


def test_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    reader, report = written(made("llama", tmp_path), tmp_path)
    assert field(reader, "general.type") == "adapter"
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "adapter.type") == "lora"
    assert field(reader, "adapter.lora.alpha") == report.alpha == 6.0
    # In ggml's order of dimensions: A is (inputs, rank), B is (rank, outputs).
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.0.attn_q.weight.lora_a"] == (16, 3)
    assert shapes["blk.0.attn_q.weight.lora_b"] == (3, 32)
    assert len(shapes) == 2 * 2 * 7
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    assert report.bytes == sum(tensor.n_bytes for tensor in reader.tensors)
    assert len(report.tensors) == 14
    assert report.rescaled == ()


@pytest.mark.parametrize(
    ("config", "alpha", "rescaled"),
    [
        ({"use_rslora": True}, 6 * 3**0.5, 0),
        ({"alpha_pattern": {"q_proj": 1, "0.mlp.up_proj": 9}}, 6.0, 3),
        ({"rank_pattern": {"q_proj": 5}}, 6.0, 0),
        ({"rank_pattern": {"q_proj": 5}, "use_rslora": True}, 6 * 3**0.5, 2),
    ],
    ids=str,
)
def test_factors_of_their_own_are_in_b(config: dict[str, Any], alpha: float, rescaled: int, tmp_path: Path) -> None:
    model = made("llama", tmp_path, **config)
    reader, report = written(model, tmp_path)
    assert report.alpha == pytest.approx(alpha)
    assert len(report.rescaled) == rescaled
    found = in_transformers(in_llama_cpp(reader), model, reordered=True)
    for path, update in updates(model).items():
        torch.testing.assert_close(found[path], update, rtol=1e-5, atol=1e-5, msg=path)


def test_starts_that_took_a_part_of_the_weight(tmp_path: Path) -> None:
    model = made("llama", tmp_path, init_lora_weights="pissa")
    reader, _ = written(model, tmp_path)
    found = in_transformers(in_llama_cpp(reader), model, reordered=True)
    for path, update in updates(model).items():
        torch.testing.assert_close(found[path], update, rtol=1e-5, atol=1e-5, msg=path)


def test_invocation_tokens(tmp_path: Path) -> None:
    reader, _ = written(made("llama", tmp_path, alora_invocation_tokens=[5, 6]), tmp_path)
    assert field(reader, "adapter.alora.invocation_tokens") == [5, 6]
    types = reader.fields["adapter.alora.invocation_tokens"].types
    assert types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]


def test_values_are_kept_bit_for_bit_where_nothing_is_reordered(tmp_path: Path) -> None:
    reader, _ = written(made("qwen2", tmp_path), tmp_path)
    own = load_file(tmp_path / "adapter_model.safetensors")
    for tensor in reader.tensors:
        if "attn_v" in tensor.name:
            letter, layer = tensor.name[-1].upper(), tensor.name.split(".")[1]
            key = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_{letter}.weight"
            assert torch.equal(torch.from_numpy(tensor.data.copy()), own[key])


def test_embeddings_and_heads(tmp_path: Path) -> None:
    model = made("llama", tmp_path, target_modules=["embed_tokens", "lm_head", "v_proj"])
    reader, _ = written(model, tmp_path)
    found = in_transformers(in_llama_cpp(reader), model, reordered=True)
    for path, update in updates(model).items():
        torch.testing.assert_close(found[path], update, rtol=1e-5, atol=1e-5, msg=path)
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    # Looked up by token: (rank, vocabulary) in ggml's order.
    assert shapes["token_embd.weight.lora_a"] == (3, 37)
    assert shapes["token_embd.weight.lora_b"] == (3, 16)
    # PEFT's copy of the base's table beside them is no part of the adapter.
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert len(written(model, tmp_path)[0].tensors) == len(reader.tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_factors_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = made("qwen2", tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    reader, _ = written(model, tmp_path)
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "biases beside B on 2 layers"),
        ({"modules_to_save": ["lm_head"]}, "holds more than factors.*lm_head.weight"),
    ],
)
def test_what_has_no_place_in_it(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    model = made("llama", tmp_path, **config)
    with pytest.raises(UsageError, match=sentence):
        written(model, tmp_path)
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:The adapter on")
def test_tied_tables(name: str, tmp_path: Path) -> None:
    model = made("llama", tmp_path, tied=True, target_modules=["q_proj", name])
    with pytest.raises(UsageError, match="share one table"):
        written(model, tmp_path)


def test_other_architectures_and_layers(tmp_path: Path) -> None:
    model = made("llama", tmp_path)
    read, config = files.read(tmp_path), model.get_base_model().config.to_dict()
    with pytest.raises(UsageError, match=r"The base is a 'lama'.*Did you mean 'llama'"):
        write_gguf(read, {**config, "model_type": "lama"}, tmp_path / "x.gguf")
    renamed = {key.replace("q_proj", "query"): tensor for key, tensor in read.tensors.items()}
    other = files.AdapterFiles(read.source, read.config, renamed, {})
    with pytest.raises(UsageError, match=r"self_attn.query' has no place in a GGUF file of a 'llama'"):
        write_gguf(other, config, tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="has no place in a GGUF file"):
        write_gguf(read, {**config, "num_hidden_layers": 1}, tmp_path / "x.gguf")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"add it with pip install 'veneer\[demo\]'"):
        write_gguf(files.read(tmp_path), model.get_base_model().config.to_dict(), tmp_path / "x.gguf")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", tmp_path)
    (tmp_path / "adapter.gguf").write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(DiskError, match="No space left"):
        write_gguf(files.read(tmp_path), model.get_base_model().config.to_dict(), tmp_path / "adapter.gguf")
    assert (tmp_path / "adapter.gguf").read_text() == "before"
    assert not list(tmp_path.glob(".*.tmp"))
