"""Public data sets as they are published, turned into the files that the recipes read.

    python recipes/originals.py FOLDER [--into data]

FOLDER has a folder for each data set, with the files that its source publishes (recipes/README.md says where from).
The digits come with scikit-learn. What is not there is passed over. Every file that is written has one example a line.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = Iterator[dict[str, Any]]


def sst2(folder: Path, split: str) -> Rows:
    """Sentences of reviews, with 0 or 1."""
    for line in (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines():
        text, label = line.rsplit("\t", 1)
        yield {"text": text, "label": ("negative", "positive")[int(label)]}


def cola(folder: Path, split: str) -> Rows:
    """Sentences of linguists, acceptable or not."""
    name = {"train": "in_domain_train", "dev": "in_domain_dev"}[split]
    for line in (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines():
        _, label, _, text = line.split("\t")
        yield {"text": text, "label": ("unacceptable", "acceptable")[int(label)]}


def trec(folder: Path, split: str, *, fine: bool = False) -> Rows:
    """Questions and what they ask for: one of 6 kinds, or of 50."""
    for line in (folder / f"{split}.txt").read_text(encoding="latin-1").splitlines():
        label, text = line.split(" ", 1)
        yield {"text": text, "label": label if fine else label.split(":")[0]}


def trec_fine(folder: Path, split: str) -> Rows:
    """As ``trec``, with 50 kinds."""
    return trec(folder, split, fine=True)


def wnut17(folder: Path, split: str) -> Rows:
    """Posts as words with tags of rare entities."""
    tokens: list[str] = []
    tags: list[str] = []
    for line in [*(folder / f"{split}.conll").read_text(encoding="utf-8").splitlines(), ""]:
        if line.strip():
            token, tag = line.split("\t")
            tokens.append(token)
            tags.append(tag)
        elif tokens:
            yield {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


def xquad(folder: Path, split: str) -> Rows:
    """Questions to paragraphs; a fifth of the paragraphs are held out, since all questions to one share its text."""
    paragraphs = [
        paragraph
        for article in json.loads((folder / "xquad.en.json").read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
    ]
    held_out = set(random.Random(0).sample(range(len(paragraphs)), len(paragraphs) // 5))
    for number, paragraph in enumerate(paragraphs):
        if (number in held_out) == (split == "dev"):
            for asked in paragraph["qas"]:
                answers = {
                    "text": [answer["text"] for answer in asked["answers"]],
                    "answer_start": [answer["answer_start"] for answer in asked["answers"]],
                }
                yield {"question": asked["question"], "context": paragraph["context"], "answers": answers}


def codah(folder: Path, split: str) -> Rows:
    """The begin of a sentence and four ends."""
    with (folder / "fold_0" / f"{split}.tsv").open(encoding="utf-8", newline="") as stream:
        for _, begin, *ends, right in csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield {"question": begin, "choices": ends, "answer": int(right)}


def multi30k(folder: Path, split: str) -> Rows:
    """Captions in English and German."""
    name = {"train": "train", "dev": "val"}[split]
    with (
        gzip.open(folder / f"{name}.en.gz", "rt", encoding="utf-8") as english,
        gzip.open(folder / f"{name}.de.gz", "rt", encoding="utf-8") as german,
    ):
        for source, target in zip(english, german, strict=True):
            yield {"translation": {"English": source.strip(), "German": target.strip()}}


def multi30k_vectors(folder: Path, split: str) -> Rows:
    """The captions as pairs that belong together."""
    for row in multi30k(folder, split):
        yield {"anchor": row["translation"]["English"], "positive": row["translation"]["German"]}


def wikisql(folder: Path, split: str) -> Rows:
    """Questions to a table, and the query that answers each."""
    name = {"train": "train", "dev": "valid", "test": "test"}[split]
    for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        asked, query = json.loads(line)["text"].split("\nA: ")
        yield {"prompt": asked, "completion": query}


def gsm8k(folder: Path, split: str) -> Rows:
    """Arithmetic in words with worked answers; the last tenth is held out."""
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    border = len(rows) * 9 // 10
    for row in rows[:border] if split == "train" else rows[border:]:
        yield {"prompt": row["question"], "completion": row["answer"]}


def self_instruct(folder: Path, split: str) -> Rows:
    """Instructions with inputs and outputs; every tenth is held out."""
    for number, line in enumerate((folder / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()):
        task = json.loads(line)
        if (number % 10 == 0) == (split == "dev"):
            for one in task["instances"]:
                yield {"instruction": task["instruction"], "input": one["input"], "output": one["output"]}


def mts_dialog(folder: Path, split: str) -> Rows:
    """Talks of doctors with patients, and the note on each."""
    name = {"train": "train", "dev": "valid"}[split]
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            yield {"source": row["dialogue"], "target": row["section_text"]}


def e2e(folder: Path, split: str) -> Rows:
    """Facts on restaurants, and sentences that tell them; a tenth of the fact sheets is held out."""
    lines = (folder / "valid.txt").read_text(encoding="utf-8").splitlines()
    sheets = sorted({line.split("||")[0] for line in lines})
    held_out = set(random.Random(0).sample(sheets, len(sheets) // 10))
    for line in lines:
        facts, sentence = line.split("||")
        if (facts in held_out) == (split == "dev"):
            yield {"prompt": facts, "completion": sentence.strip()}


SETS: dict[str, tuple[str, Callable[[Path, str], Rows], tuple[str, ...]]] = {
    "sst2": ("sst2", sst2, ("train", "dev", "test")),
    "cola": ("cola", cola, ("train", "dev")),
    "trec": ("trec_qc", trec, ("train", "test")),
    "trec-fine": ("trec_qc", trec_fine, ("train", "test")),
    "wnut17": ("wnut17_ner", wnut17, ("train", "dev")),
    "xquad": ("xquad", xquad, ("train", "dev")),
    "codah": ("codah", codah, ("train", "dev", "test")),
    "multi30k": ("multi30k", multi30k, ("train", "dev")),
    "multi30k-vectors": ("multi30k", multi30k_vectors, ("train", "dev")),
    "wikisql": ("wikisql_mlx", wikisql, ("train", "dev", "test")),
    "gsm8k": ("gsm8k", gsm8k, ("train", "dev")),
    "self-instruct": ("self_instruct", self_instruct, ("train", "dev")),
    "mts-dialog": ("mts_dialog", mts_dialog, ("train", "dev")),
    "e2e": ("e2e_nlg", e2e, ("train", "dev")),
}
"""From each name to the folder of its originals, what reads them, and the splits there are."""


def convert(originals: Path, into: Path) -> list[str]:
    """Write every data set whose originals are there; the names of those that are not."""
    missing = []
    for name, (folder, read, splits) in SETS.items():
        if not (originals / folder).is_dir():
            missing.append(name)
            continue
        (into / name).mkdir(parents=True, exist_ok=True)
        for split in splits:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in read(originals / folder, split)]
            (into / name / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return missing


def digits(into: Path) -> None:
    """Scans of handwritten digits, which come with scikit-learn: 0 to 4 as ``low`` and 5 to 9 as ``high``.

    A folder for each digit; every fifth image is for the test.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    scans = load_digits()
    for number, (scan, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        split = "test" if number % 5 == 0 else "train"
        folder = into / "digits" / ("low" if digit < 5 else "high") / split / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((scan * 255 / 16).astype("uint8")).save(folder / f"{number:04}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("originals", type=Path)
    parser.add_argument("--into", type=Path, default=Path("data"))
    options = parser.parse_args()
    missing = convert(options.originals, options.into)
    digits(options.into)
    print(f"{len(SETS) - len(missing)} data sets in {options.into}; no originals of: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
