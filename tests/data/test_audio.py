from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from tests import speech
from veneer.core.errors import DataError, UsageError
from veneer.data import audio, media
from veneer.data.encode import Encoded
from veneer.data.rows import Row
from veneer.data.sources import read_rows

EXTRACTOR = speech.processor().feature_extractor


def row(value: Any, folder: Path | None = None) -> Row:
    return Row("a.csv:2", {"audio": value, "text": "low"}, folder)


def clip(value: Any, cut: str | None = None) -> Encoded:
    kept, _ = audio.heard(row(value), EXTRACTOR)
    return Encoded("a.csv:2", [], [], {**kept, **({"cut": cut} if cut else {})})


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_features_are_those_of_the_extractor(kind: str) -> None:
    content = speech.encoded("low", kind)
    samples, rate = audio.decoded(content, "a", "b")
    assert (rate, samples.dtype) == (16_000, np.float32)
    expected = EXTRACTOR([samples], sampling_rate=16_000, return_tensors="pt")["input_features"]
    found = audio.features([clip({"bytes": content, "path": None})], EXTRACTOR)
    assert np.array_equal(found["input_features"], expected)
    assert found["input_features"].shape == (1, 8, 100)
    if kind != "OGG":
        assert np.abs(samples - speech.tone("low")[:, 0]).max() < 1e-4


def test_other_rates_are_resampled_and_channels_mixed_down() -> None:
    content = speech.encoded("low", rate=8_000, channels=2)
    found = audio.features([clip({"bytes": content})], EXTRACTOR)["input_features"]
    own, _ = soundfile.read(__import__("io").BytesIO(content), dtype="float32")
    mixed = soxr.resample(own.mean(axis=1), 8_000, 16_000)
    expected = EXTRACTOR([mixed], sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert np.allclose(found, expected, atol=1e-6)
    assert audio.heard(row({"bytes": content}), EXTRACTOR)[1] == 8_000


def test_it_is_said_once_how_many_are_resampled_or_mixed_down() -> None:
    made = [("low", 16_000, 1), ("low", 8_000, 1), ("low", 8_000, 2), ("high", 44_100, 1)]
    rows = [row({"bytes": speech.encoded(word, rate=rate, channels=count)}) for word, rate, count in made]
    assert audio.remarks([*rows, row("gone.wav"), row({"bytes": b"x"})], EXTRACTOR) == [
        "3 of 4 clips are resampled to 16,000 Hz: 2 of 8,000 Hz, 1 of 44,100 Hz.",
        "1 of 4 clips have several channels, which are mixed down to one.",
    ]
    assert audio.remarks(rows[:1], EXTRACTOR) == []


def test_a_sound_in_memory_is_kept_as_it_is() -> None:
    value = {"array": speech.tone("low")[:, 0].astype("float64"), "sampling_rate": 16_000, "path": "x.wav"}
    file = audio.sound_file(row(value))
    samples, rate = audio.decoded(media.content(file), "a", file)
    assert rate == 16_000
    assert np.array_equal(samples, speech.tone("low")[:, 0])


@pytest.mark.parametrize("side", ["end", "start"])
def test_what_is_longer_than_a_window_is_cut_at_a_side(side: str) -> None:
    samples = np.concatenate([speech.tone("low", seconds=1), speech.tone("high", seconds=1)])[:, 0]
    value = {"array": samples, "sampling_rate": 16_000}
    kept = samples[-16_000:] if side == "start" else samples[:16_000]
    expected = EXTRACTOR([kept], sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert np.array_equal(audio.features([clip(value, side)], EXTRACTOR)["input_features"], expected)


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_truncated_one_is_named(kind: str, tmp_path: Path) -> None:
    content = speech.encoded("low", kind)
    (tmp_path / "a.wav").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.csv:2 has no whole sound: '.*a\.wav' (is truncated|cannot be decoded)"):
        audio.heard(row("a.wav", tmp_path), EXTRACTOR)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file in the row is empty"),
        (b"no sound at all", "cannot be decoded: Error opening"),
        (speech.encoded("low", seconds=0), "has no samples"),
    ],
)
def test_what_is_no_sound_is_named(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.csv:2 has no whole sound: .*{message}"):
        audio.heard(row({"bytes": content}), EXTRACTOR)


def test_numbers_that_are_not_finite_are_named() -> None:
    array = speech.tone("low")[:, 0]
    array[3] = np.nan
    with pytest.raises(DataError, match="not finite"):
        audio.heard(row({"array": array, "sampling_rate": 16_000}), EXTRACTOR)


def test_a_header_that_was_written_before_the_end_is_no_truncation() -> None:
    content = bytearray(speech.encoded("low"))
    content[4:8] = (0xFFFFFFFF).to_bytes(4, "little")
    assert audio.heard(row({"bytes": bytes(content)}), EXTRACTOR)[1] == 8_000


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs soundfile, soxr; install it: pip install 'veneer\[speech\]'"):
        audio.check_installed()


def test_a_folder_without_a_table_has_sounds_alone(tmp_path: Path) -> None:
    place = speech.folder(tmp_path / "clips", count=4)
    (place / "metadata.csv").unlink()
    assert [one.values for one in read_rows(place)] == [
        {"audio": f"{at}.{('wav', 'flac')[at // 2]}"} for at in range(4)
    ]
