"""Clips that the speech recipe reads: captions that espeak-ng speaks with an accent, and a human voice's prompts.

    python recipes/speech.py FOLDER [--into data]

The captions are those of multi30k, which originals.py has put into ``data``; FOLDER has the prompts in ``asterisk``
(recipes/README.md says where they are from). Each set is a folder of WAV files with a table of what is said.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import re
import shutil
import subprocess
import wave
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ACCENT = "en-gb-x-gbclan"
"""Of Lancaster: of espeak-ng's, one that Whisper tiny.en gets about every other word of wrong."""
COUNTS = {"train": 400, "dev": 40, "test": 100}
"""How many captions are spoken for each split."""
PROMPTS = 100
"""How many prompts of the human voice are for the test; the others may be trained on."""
_MOST_SECONDS = 29.0
"""Whisper hears 30."""
_LEAST_WORDS, _MOST_WORDS = 4, 16
_SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
_TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"

Speak = Callable[[str, Path], None]
"""Writes a text to a WAV file."""


def espeak(text: str, path: Path) -> None:
    """Speak by espeak-ng, which says the same samples every time.

    Raises:
        SystemExit: it is not installed, or fails.
    """
    program = shutil.which("espeak-ng")
    if program is None:
        raise SystemExit("The accent is spoken by the program espeak-ng, which is not here: apt-get install espeak-ng")
    command = [program, "-v", ACCENT, "-w", str(path), "--stdin"]
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"espeak-ng cannot speak {text!r}: {done.stderr.strip()}")


def captions(path: Path, count: int) -> list[str]:
    """Different English captions in a random order that is always the same: short ones, and without rare signs.

    Raises:
        SystemExit: there are not so many.
    """
    if not path.is_file():
        raise SystemExit(f"There are no captions in {path}; let originals.py write those of multi30k first.")
    rows = [json.loads(line)["translation"]["English"] for line in path.read_text(encoding="utf-8").splitlines()]
    fit = sorted({text for text in rows if text.isascii() and len(text.split()) <= _MOST_WORDS})
    if len(fit) < count:
        raise SystemExit(f"{path} has {len(fit):,} short captions; expected {count:,}.")
    return random.Random(0).sample(fit, count)


def accent(into: Path, speak: Speak = espeak, counts: Mapping[str, int] = COUNTS) -> None:
    """Captions with an accent, each in one split: ``accent/train``, ``accent/dev`` and ``accent/test``."""
    texts = iter(captions(into / "multi30k" / "train.jsonl", sum(counts.values())))
    for split, count in counts.items():
        folder = emptied(into / "accent" / split)
        said = {f"{at:03}.wav": next(texts) for at in range(count)}
        for name, text in said.items():
            speak(text, folder / name)
        write_table(folder, said.items())


def prompts(packages: Path, into: Path, count: int = PROMPTS) -> None:
    """The prompts of a telephone exchange by a human voice, at 8 kHz: ``prompts/train`` and ``prompts/test``.

    Args:
        packages: what asterisk-core-sounds-en and asterisk-core-sounds-en-wav hold.
        into: where to write.
        count: how many are for the test.

    Raises:
        SystemExit: the packages are not there.
    """
    sounds, table = packages / _SOUNDS, packages / _TEXTS
    if not (sounds.is_dir() and table.is_file()):
        raise SystemExit(f"There are no asterisk-core-sounds in {packages}; see recipes/README.md for how to get them.")
    said = {}
    for line in gzip.decompress(table.read_bytes()).decode("utf-8").splitlines():
        name, _, text = line.partition(": ")
        path = sounds / f"{name}.wav"
        words = re.findall(r"[\w']+", text.casefold())
        # What is in brackets is not said but heard, as silence or a tone, and of a sign it is open how it is said.
        if len(words) < _LEAST_WORDS or any(sign in text for sign in "[(*#") or not path.is_file():
            continue
        if seconds(path) <= _MOST_SECONDS:
            said[" ".join(words)] = (path, text.strip())
    mixed = random.Random(0).sample(sorted(said.values()), len(said))
    for split, chosen in {"test": mixed[:count], "train": mixed[count:]}.items():
        folder = emptied(into / "prompts" / split)
        for path, _ in chosen:
            (folder / path.name).write_bytes(path.read_bytes())
        write_table(folder, ((path.name, text) for path, text in chosen))


def seconds(path: Path) -> float:
    """How long a WAV file is."""
    with wave.open(str(path)) as clip:
        return clip.getnframes() / clip.getframerate()


def emptied(folder: Path) -> Path:
    """A folder without anything of an earlier time."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_table(folder: Path, rows: Iterable[tuple[str, str]]) -> None:
    """The table of what is said."""
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file_name", "text"))
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("originals", type=Path)
    parser.add_argument("--into", type=Path, default=Path("data"))
    options = parser.parse_args()
    accent(options.into)
    prompts(options.originals / "asterisk", options.into)
    print(
        f"{sum(COUNTS.values())} captions in {options.into / 'accent'}, a voice's prompts in {options.into / 'prompts'}"
    )


if __name__ == "__main__":
    main()
