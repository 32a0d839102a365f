"""A tiny Whisper on disk that hears one second, and tones whose height is what is said, made here."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from tokenizers import pre_tokenizers

HERTZ = {"low": 200, "high": 2000}
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|translate|>", "<|transcribe|>")
LAST = ("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>")
END, START, GERMAN, TRANSLATE, TRANSCRIBE, NO_TIMES = 256, 257, 260, 261, 262, 266
ENGLISH, MANY = 300, 51_865


def tokenizer() -> Any:
    """Whisper's, of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*alphabet, *SPECIAL, *LAST])}
    made = transformers.WhisperTokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token="<|endoftext|>",
        additional_special_tokens=[*SPECIAL, *LAST],
    )
    assert made.convert_tokens_to_ids(["<|endoftext|>", "<|notimestamps|>"]) == [END, NO_TIMES]
    return made


def config(vocabulary: int = ENGLISH, **settings: Any) -> Any:
    """A Whisper, 16 wide."""
    return transformers.WhisperConfig(
        **{
            "vocab_size": vocabulary,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "max_source_positions": 50,
            "max_target_positions": 48,
            "bos_token_id": END,
            "eos_token_id": END,
            "pad_token_id": END,
            "decoder_start_token_id": START,
            "init_std": 0.2,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            **settings,
        }
    )


def processor() -> Any:
    """Features of one second, and the tokenizer."""
    return transformers.WhisperProcessor(
        transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer()
    )


def model(vocabulary: int = ENGLISH, **settings: Any) -> Any:
    """A random one."""
    torch.manual_seed(0)
    made = transformers.WhisperForConditionalGeneration(config(vocabulary, **settings))
    generation: dict[str, Any] = {"no_timestamps_token_id": NO_TIMES, "is_multilingual": vocabulary == MANY}
    if vocabulary == MANY:
        generation["lang_to_id"] = {"<|en|>": GERMAN - 2, "<|de|>": GERMAN}
        generation["task_to_id"] = {"translate": TRANSLATE, "transcribe": TRANSCRIBE}
    generation["_from_model_config"] = False
    for name, value in generation.items():
        setattr(made.generation_config, name, value)
    return made


def saved(folder: Path, vocabulary: int = ENGLISH, **settings: Any) -> Path:
    """Model and processor in a folder."""
    model(vocabulary, **settings).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def tone(word: str, *, seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> Any:
    """(samples, channels) float32, the second channel silent."""
    wave = 0.5 * np.sin(2 * np.pi * HERTZ[word] * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave, *[np.zeros_like(wave)] * (channels - 1)], axis=1).astype(np.float32)


def encoded(word: str, kind: str = "WAV", **settings: Any) -> bytes:
    """The same as the content of a file."""
    made = io.BytesIO()
    soundfile.write(made, tone(word, **settings), settings.get("rate", 16_000), format=kind)
    return made.getvalue()


def folder(place: Path, count: int = 8, **settings: Any) -> Path:
    """Clips with a table of what is said."""
    place.mkdir(parents=True)
    with (place / "metadata.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file_name", "transcription"])
        for at in range(count):
            word = ("low", "high")[at % 2]
            name = f"{at}.{('wav', 'flac')[at % 4 // 2]}"
            kind = name.split(".")[1].upper()
            (place / name).write_bytes(encoded(word, kind, **{"seconds": 0.2 + 0.05 * at, **settings}))
            table.writerow([name, word])
    return place
