from __future__ import annotations

import builtins
import gzip
import hashlib
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.core.errors import DataError, UsageError
from veneer.data import arrow
from veneer.data.sources import HELD_OUT_NAMES, TRAIN_NAMES, chosen, in_memory, read_rows, rows_of, sources


def test_jsonl_rows_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "one"}\r\n\n{"text": "zwei \u00fc"}\n'.encode())
    rows = read_rows(path)
    assert [(row.origin, row.values["text"]) for row in rows] == [("a.jsonl:1", "one"), ("a.jsonl:3", "zwei ü")]


def test_csv_rows_know_the_line_they_start_at(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"two\nlines",x\n\nlast,"a ""quote"""\n', encoding="utf-8")
    rows = read_rows(path)
    assert [row.origin for row in rows] == ["a.csv:2", "a.csv:5"]
    assert rows[0].values == {"prompt": "two\nlines", "completion": "x"}
    assert rows[1].values["completion"] == 'a "quote"'


def test_csv_takes_fields_longer_than_pythons_own_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert len(read_rows(path)[0].values["text"]) == 200_000


def test_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "hi"}]}, {"messages": [{"role": "user", "content": "ho"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = read_rows(tmp_path / "a.parquet")
    assert [row.origin for row in read] == ["a.parquet:1", "a.parquet:2"]
    assert [dict(row.values) for row in read] == rows


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"pip install 'veneer\[data\]'"):
        read_rows(tmp_path / "a.parquet")


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet is not readable as Parquet"):
        read_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not a line of JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', r"a\.jsonl:2 is a JSON list; expected an object"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', r"a\.jsonl:3 is not UTF-8: byte 0xff at position 11"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not a line of JSON: nested too deeply"),
        ("a.jsonl", b"", r"a\.jsonl holds no rows"),
        ("a.jsonl", b"\n \n", r"a\.jsonl holds no rows"),
        ("a.csv", b"text\n", r"a\.csv holds no rows"),
        ("a.csv", b"", r"a\.csv holds no rows"),
        ("a.csv", b"text\nfine\n\xe9t\xe9\n", r"a\.csv:3 is not UTF-8: byte 0xe9"),
        ("a.txt", b"fine\n\xff\n", r"a\.txt:2 is not UTF-8: byte 0xff"),
        ("a.json", b'[{"text": "a"}, 3]', r"a\.json:2 is a JSON int; expected a list of objects"),
        ("a.csv", b"t\xe9xt\nfine\n", r"a\.csv:1 is not UTF-8: byte 0xe9"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv:3 has 3 cells; expected 2: a, b"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv:1 has the columns a, a"),
        ("a.csv", b'a,b\n"1,2\n', r"a\.csv is not readable as CSV"),
    ],
)
def test_bad_content_is_one_sentence_with_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "origin"),
    [("train.jsonl.gz", '{"text": "grün"}\n', "train.jsonl.gz:1"), ("train.csv.GZ", "text\ngrün\n", "train.csv.GZ:2")],
)
def test_gzipped_files_are_read_as_what_is_in_them(tmp_path: Path, name: str, content: str, origin: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    assert [(row.origin, row.values) for row in read_rows(tmp_path)] == [(origin, {"text": "grün"})]
    assert [source.place for source in chosen(sources(tmp_path), TRAIN_NAMES)] == [str(tmp_path / name)]


def test_a_broken_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    damaged = whole[:10] + b"\xff" * 8 + whole[18:]
    for content in (b"not gzip at all", whole[:-9], damaged):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz is not readable as gzip: "):
            read_rows(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.xml.gz").write_bytes(whole)
    with pytest.raises(UsageError, match=r"ends in '\.xml\.gz'"):
        read_rows(tmp_path / "a.xml.gz")


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "notes.xml").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no file or folder .*Did you mean 'train\.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UsageError, match=r"ends in '\.xml'; expected one of \.json, \.jsonl, \.csv, \.parquet"):
        read_rows(tmp_path / "notes.xml")
    with pytest.raises(UsageError, match="has no data files"):
        read_rows(tmp_path / "empty")


def test_a_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "notes.txt"):
        (tmp_path / name).write_text("text\nx\n" if name.endswith("csv") else '{"text": "y"}\n')
    assert [row.origin for row in read_rows(tmp_path)] == ["a.csv:2", "b.jsonl:1"]


def test_files_are_chosen_by_their_first_word(tmp_path: Path) -> None:
    names = ["train.jsonl", "train-0001.jsonl", "training.jsonl", "valid.csv", "dev_2.jsonl", "test.jsonl"]
    for name in names:
        (tmp_path / name).write_text("x")
    files = sources(tmp_path)
    assert {file.name for file in chosen(files, TRAIN_NAMES)} == {"train.jsonl", "train-0001.jsonl"}
    assert {file.name for file in chosen(files, HELD_OUT_NAMES)} == {"valid.csv", "dev_2.jsonl"}


def test_examples_in_memory() -> None:
    assert [row.origin for row in rows_of([{"text": "a"}, {"text": "b"}])] == ["example 1", "example 2"]
    with pytest.raises(DataError, match="list of examples is empty"):
        rows_of([])


@settings(max_examples=30)
@given(st.lists(st.dictionaries(st.text(), st.text(st.characters(exclude_categories=["Cs"]))), min_size=1))
def test_whatever_json_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, values: list[dict]) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    assert [dict(row.values) for row in read_rows(path)] == values


@pytest.mark.parametrize(
    ("name", "content", "kept", "reasons"),
    [
        ("a.jsonl", b'{"text": "a"}\n{\n[1]\n\xff\n{"text": "b"}\n', [1, 5], [2, 3, 4]),
        ("a.txt", b"a\n\n\xff\nb\n", [1, 4], [3]),
        ("a.csv", b'text,more\n"a\nb",1\n\xff,1\n1,2,3\nb,1\n', [2, 6], [4, 5]),
        ("a.json", b'[{"text": "a"}, 3, {"text": "b"}]', [1, 3], [2]),
    ],
)
def test_each_bad_row_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, kept: list[int], reasons: list[int]
) -> None:
    (tmp_path / name).write_bytes(content)
    bad: list[str] = []
    assert [row.origin for row in read_rows(tmp_path / name, bad=bad)] == [f"{name}:{number}" for number in kept]
    assert [reason.split(" ")[0] for reason in bad] == [f"{name}:{number}" for number in reasons]


def test_csv_cells_may_have_line_separators_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\none\u2028two,three\x0cfour\n", encoding="utf-8")
    (row,) = read_rows(tmp_path / "a.csv")
    assert row.values == {"prompt": "one\u2028two", "completion": "three\x0cfour"}


def test_each_line_of_a_text_is_an_example(tmp_path: Path) -> None:
    """As the text reader of datasets does it, but for blank lines."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.txt").write_bytes("one \n\ntwo\r\n  drei \u00fc\n".encode())
    rows = read_rows(tmp_path / "a.txt")
    assert [row.origin for row in rows] == ["a.txt:1", "a.txt:3", "a.txt:4"]
    theirs = datasets.Dataset.from_text(str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"))["text"]
    assert [row.values["text"] for row in rows] == [text for text in theirs if text.strip()]


def test_several_names_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.jsonl").write_text('{"text": "y"}\n')
    found = read_rows([tmp_path / "b.jsonl", str(tmp_path / "[ab].jsonl"), tmp_path / "b.jsonl"])
    assert [row.origin for row in found] == ["b.jsonl:1", "a.jsonl:1"]
    assert [row.origin for row in read_rows(tmp_path / "*.txt")] == ["c.txt:1"]
    assert len(read_rows(str(tmp_path / "**" / "*.jsonl"))) == 3
    # Two files of one name are told apart by their folders.
    twins = [tmp_path / "a.jsonl", tmp_path / "more" / "a.jsonl"]
    assert [row.origin for row in read_rows(twins)] == [f"{path}:1" for path in twins]
    with pytest.raises(UsageError, match=r"No file matches .*\*\.csv'; expected files ending in"):
        read_rows(tmp_path / "*.csv")


def test_shards_in_folders_of_a_folder(tmp_path: Path) -> None:
    hidden = (".cache/0001.jsonl", "train/.0001.jsonl", "._train.jsonl")
    for name in ("train/0001.jsonl", "train/0002.jsonl", "validation/0001.jsonl", *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    found = sources(tmp_path)
    assert len(chosen(found, TRAIN_NAMES)) == 2
    assert [source.place for source in chosen(found, HELD_OUT_NAMES)] == [str(tmp_path / "validation" / "0001.jsonl")]


def test_stdin_is_jsonl_that_can_be_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "one"}\n{\n')))
    (source,) = sources("-")
    for _ in range(2):
        row, bad = source.read()
        assert (row.origin, row.values) == ("stdin:1", {"text": "one"})
        assert bad.reason.startswith("stdin:2 is not a line of JSON")
    assert source.digest() == hashlib.sha256(b'{"text": "one"}\n{\n').hexdigest()


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": text}]} for text in "abc"]
    whole = datasets.Dataset.from_list(rows)
    whole.select([2, 0]).save_to_disk(tmp_path / "one", num_shards=2)
    assert [(row.origin, row.values) for row in read_rows(tmp_path / "one")] == [("one:1", rows[2]), ("one:2", rows[0])]
    datasets.DatasetDict(train=whole, validation=whole.select([1])).save_to_disk(tmp_path / "two")
    found = sources(tmp_path / "two")
    assert [source.name for source in chosen(found, TRAIN_NAMES)] == ["two[train]"]
    (held_out,) = chosen(found, HELD_OUT_NAMES)
    assert [row.values for row in held_out.read()] == [rows[1]]
    assert len({source.digest() for source in [*found, *sources(tmp_path / "one")]}) == 3
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UsageError, match=r"'.*one' is no whole folder of datasets' save_to_disk"):
        sources(tmp_path / "one")


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, configuration: str | None) -> object:
        asked.append((name, configuration))
        rows = datasets.Dataset.from_list([{"text": "a"}])
        return datasets.DatasetDict(train_sft=rows, test_sft=rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, _ = sources("someone/chats:main")
    assert asked == [("someone/chats", "main")]
    assert chosen([train], TRAIN_NAMES) == [train]
    assert [row.origin for row in train.read()] == ["chats:main[train_sft]:1"]


def test_a_copy_of_the_hub_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network; the folder is as the library leaves it after a download."""
    datasets = pytest.importorskip("datasets")
    cache = tmp_path / "cache"
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    for name, path in files.items():
        Path(path).write_text(json.dumps({"text": name}) + "\n")
    datasets.load_dataset("json", data_files=files, cache_dir=str(cache))
    (made,) = (path for path in cache.glob("json/*/*/*") if path.is_dir())
    copy = cache / "someone___chats" / "main" / "0.0.0" / made.name
    copy.parent.mkdir(parents=True)
    made.rename(copy)
    for path in copy.glob("json-*"):
        path.rename(path.with_name(path.name.replace("json-", "chats-")))
    about = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps({**about, "dataset_name": "chats", "config_name": "main"}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for name in ("someone/chats", "someone/chats:main"):
        rows = [row for source in sources(name) for row in source.read()]
        short = name.split("/")[1]
        assert [(row.origin, row.values) for row in rows] == [
            (f"{short}[train]:1", {"text": "train"}),
            (f"{short}[validation]:1", {"text": "validation"}),
        ]
    with pytest.raises(UsageError, match="is not in the cache, and the hub is switched off"):
        sources("someone/chats:other")


def test_a_name_on_the_hub_that_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "chats").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        UsageError,
        match=r"^There is no file or folder 'someone/cahts', and as .* switched off\. Did you mean 'chats'\?$",
    ):
        sources("someone/cahts")
    # Names without an owner may be the library's own readers, which would read whatever lies around.
    assert not arrow.may_be_on_hub("json")
    with pytest.raises(UsageError, match=r"^There is no file or folder 'json'\.$"):
        sources("json")


def test_the_hub_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(name: str, configuration: str | None) -> object:
        raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        UsageError, match=r"'a/b', and the hub gave no data for it: Config name is missing\. Please pick one"
    ):
        sources("a/b")


def test_lines_of_json_by_any_name(tmp_path: Path) -> None:
    for name in ("a.json", "a.ndjson"):
        (tmp_path / name).write_text('\n{"text": "one"}\n[1]\n{"text": "two"}\n')
        bad: list[str] = []
        assert [row.origin for row in read_rows(tmp_path / name, bad=bad)] == [f"{name}:2", f"{name}:4"]
        assert bad[0].startswith(f"{name}:3 is a JSON list")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes()))
    assert [row.origin for row in read_rows(tmp_path, bad=[])] == [
        f"{name}:{at}" for name in ("a.json.gz", "a.ndjson") for at in (2, 4)
    ]
    (tmp_path / "b.json").write_text('[\n{"text": "one"},\n{"text": "two"}\n]')
    assert [row.origin for row in read_rows(tmp_path / "b.json")] == ["b.json:1", "b.json:2"]


def test_examples_of_a_program() -> None:
    datasets = pytest.importorskip("datasets")
    values = [{"text": "a"}, {"text": "b"}]
    for examples in (values, iter(values), datasets.Dataset.from_list(values)):
        source = in_memory(examples)
        for _ in range(2):
            assert [(row.origin, row.values) for row in source.read()] == [
                ("example 1", values[0]),
                ("example 2", values[1]),
            ]
        assert source.digest() is None
    (bad,) = in_memory(["text"]).read()
    assert bad.reason == "example 1 is a str; expected a mapping with columns."
    with pytest.raises(DataError, match="list of examples is empty"):
        in_memory(iter([]))


def test_squads_own_json_is_a_row_for_each_question(tmp_path: Path) -> None:
    answers = [{"text": "Rome", "answer_start": 3}]
    paragraph = {"context": "In Rome.", "qas": [{"id": "x", "question": "Where?", "answers": answers}, "when"]}
    document = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph, {"qas": []}]}]}
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(document))
    bad: list[str] = []
    (row,) = read_rows(str(path), bad=bad)
    assert row.origin == "dev.json:1"
    assert row.values == {"context": "In Rome.", "id": "x", "question": "Where?", "answers": answers}
    assert bad == [
        "dev.json: data[0].paragraphs[0].qas[1] is no object with a question.",
        "dev.json: data[0].paragraphs[1] has no context with qas, as SQuAD's files do.",
    ]
