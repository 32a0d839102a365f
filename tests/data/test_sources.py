from __future__ import annotations

import builtins
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.core.errors import DataError, UsageError
from veneer.data.sources import HELD_OUT_NAMES, TRAIN_NAMES, chosen, data_files, read_rows, rows_of


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
    assert chosen(data_files(tmp_path), TRAIN_NAMES) == [tmp_path / name]


def test_a_broken_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    damaged = whole[:10] + b"\xff" * 8 + whole[18:]
    for content in (b"not gzip at all", whole[:-9], damaged):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl\.gz is not readable as gzip: "):
            read_rows(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.txt.gz").write_bytes(whole)
    with pytest.raises(UsageError, match=r"ends in '\.txt\.gz'"):
        read_rows(tmp_path / "a.txt.gz")


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no file or folder .*Did you mean 'train\.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UsageError, match=r"ends in '\.txt'; expected one of \.json, \.jsonl, \.csv, \.parquet"):
        read_rows(tmp_path / "notes.txt")
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
    files = data_files(tmp_path)
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
