"""Sounds of files as rows name them: checked when they are encoded, decoded and resampled when a batch needs them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from veneer.core.errors import DataError, UsageError, listed
from veneer.data.encode import Encoded
from veneer.data.media import content, file_of, in_row, known, named
from veneer.data.rows import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMNS = ("audio", "file_name")

_PACKAGES = ("soundfile", "soxr")
_STREAMED = 0x7FFFF000
"""From this size on, the header of a WAV file was written before its length was known."""


def check_installed() -> None:
    """Refuse to begin what could not be read.

    Raises:
        UsageError: a package is missing.
    """
    import importlib.util

    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"Reading sound needs {listed(missing)}; install it: pip install 'veneer[speech]'.")


def sound_file(row: Row) -> str:
    """The file of a row's sound. See ``media.file_of``; a dict of ``array`` and ``sampling_rate`` is taken too.

    Raises:
        DataError: the row names none.
    """
    return file_of(row, COLUMNS, _as_wav)


def rate(extractor: Any) -> int:
    """The samples a second that a model wants."""
    return int(extractor.sampling_rate)


def longest(extractor: Any) -> int | None:
    """The most samples that a model takes: of Whisper those of 30 seconds; None where there is no limit."""
    found = getattr(extractor, "n_samples", None)
    return int(found) if found is not None else None


def heard(row: Row, extractor: Any) -> tuple[dict[str, Any], int]:
    """What an example keeps of a row's sound, and its length in samples of the model's rate.

    Raises:
        DataError: it is empty, truncated, or no sound.
    """
    data, kept = known(row, sound_file(row))
    samples, own = decoded(data, row.origin, kept["file"])
    return dict(kept), -(-len(samples) * rate(extractor) // own)


def decoded(data: bytes, origin: str, file: str) -> tuple[NDArray[np.float32], int]:
    """A sound as (samples,) float32 between -1 and 1, its channels mixed down, and its samples a second.

    Raises:
        DataError: it is empty, truncated, or no sound.
    """
    import numpy as np
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as opened:
            frames, own = opened.frames, int(opened.samplerate)
            channels = opened.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, OSError) as error:
        reason = f"cannot be decoded: {str(error).rstrip('.')}" if data else "is empty"
        raise DataError(f"{origin} has no whole sound: {named(file)} {reason}.") from None
    if _is_cut(data) or len(channels) < frames:
        raise DataError(f"{origin} has no whole sound: {named(file)} is truncated.")
    mono: NDArray[np.float32] = channels.mean(axis=1, dtype=np.float32)
    if not len(mono) or not np.isfinite(mono).all():
        reason = "has samples that are not finite" if len(mono) else "has no samples"
        raise DataError(f"{origin} has no whole sound: {named(file)} {reason}.")
    return mono, own


def features(examples: Sequence[Encoded], extractor: Any) -> dict[str, Any]:
    """What a model's feature extractor makes of some sounds: of Whisper ``input_features``, (B, bins, frames) float32.

    A sound that is longer than the model takes is cut as the example's ``more`` says under "cut".

    Raises:
        DataError: a file that has changed and cannot be read any more.
    """
    import soxr

    wanted, most = rate(extractor), longest(extractor)
    sounds = []
    for example in examples:
        file = example.more["file"]
        try:
            data = content(file)
        except OSError as error:
            raise DataError(f"{example.origin} names {file}, which cannot be read any more: {error}.") from None
        samples, own = decoded(data, example.origin, file)
        if own != wanted:
            samples = soxr.resample(samples, own, wanted)
        sounds.append(_cut(samples, most, example.more.get("cut", "end")))
    # Whisper is made for a full window, whatever the length of the sound; others for the longest of a batch.
    padding = {"padding": "longest"} if most is None else {}
    return dict(extractor(sounds, sampling_rate=wanted, return_tensors="pt", **padding))


def remarks(rows: Iterable[Row], extractor: Any) -> list[str]:
    """Sentences on sounds that have to be resampled or mixed down; what cannot be read is passed over."""
    import soundfile

    rates: Counter[int] = Counter()
    count = mixed = 0
    for row in rows:
        try:
            file = sound_file(row)
            about = soundfile.info(io.BytesIO(content(file)) if in_row(file) else file)
        except (DataError, OSError, RuntimeError, soundfile.SoundFileError):
            continue
        count += 1
        mixed += about.channels > 1
        if about.samplerate != rate(extractor):
            rates[about.samplerate] += 1
    said = []
    if rates:
        each = listed(f"{number:,} of {own:,} Hz" for own, number in sorted(rates.items()))
        said.append(f"{sum(rates.values()):,} of {count:,} clips are resampled to {rate(extractor):,} Hz: {each}.")
    if mixed:
        said.append(f"{mixed:,} of {count:,} clips have several channels, which are mixed down to one.")
    return said


def _cut(samples: NDArray[np.float32], most: int | None, side: Literal["end", "start"]) -> NDArray[np.float32]:
    if most is None or len(samples) <= most:
        return samples
    return samples[-most:] if side == "start" else samples[:most]


def _is_cut(data: bytes) -> bool:
    """Whether a WAV file is shorter than it says: its reader would take what is there for all."""
    if data[:4] != b"RIFF":
        return False
    size = int.from_bytes(data[4:8], "little")
    return size < _STREAMED and size + 8 > len(data) + 1


def _as_wav(value: Any) -> bytes | None:
    """A sound in memory, as ``datasets`` decodes it, as the content of a file of 32-bit floats."""
    if not isinstance(value, Mapping) or value.get("array") is None or not value.get("sampling_rate"):
        return None
    import numpy as np
    import soundfile

    made = io.BytesIO()
    array = np.asarray(value["array"], dtype=np.float32)
    soundfile.write(made, array, int(value["sampling_rate"]), format="WAV", subtype="FLOAT")
    return made.getvalue()
