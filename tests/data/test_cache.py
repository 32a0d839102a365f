"""Encoded data on disk: equal to what is encoded anew, for any number of workers, and found again only when it is."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests import chat
from veneer.core.errors import DataError, UsageError, VeneerError
from veneer.data import workers as processes
from veneer.data.cache import Prepared, prepared
from veneer.data.encode import Encoded, EncodedSet, encode
from veneer.data.encoder import Encoder
from veneer.data.formats import recognise
from veneer.data.sources import in_memory, rows_of, sources
from veneer.data.store import Store
from veneer.tasks.causal_lm import Task

TOKENIZER = chat.tokenizer()


def encoder(max_length: int = 24, tokenizer: Any = TOKENIZER, **how: Any) -> Encoder:
    encode_rows = functools.partial(_encoded, tokenizer=tokenizer, max_length=max_length, **how)
    return Encoder(encode_rows, tokenizer, {})


def _encoded(rows: Any, tokenizer: Any, **how: Any) -> EncodedSet:
    return encode(recognise(rows), tokenizer, **how)


def read(path: Path, cache: Path | None = None, **more: Any) -> Prepared:
    how = {"max_length": more.pop("max_length", 24)}
    return prepared(sources(path), more.pop("encoder", encoder(**how)), how, cache=cache, **more)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """More rows than a chunk has, with some that are left out."""
    masked = {"messages": [{"role": "user", "content": "u"}]}
    each = [masked if at % 50 == 7 else row for at, row in enumerate(chat.pairs(300))]
    return chat.written(tmp_path / "rows.jsonl", each)


def same(found: EncodedSet, wanted: EncodedSet) -> bool:
    return (
        list(found.examples) == list(wanted.examples)
        and found.report == wanted.report
        and list(found.lengths) == list(wanted.lengths)
        and found.fingerprint == wanted.fingerprint
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_kept_is_what_was_encoded(rows: Path, tmp_path: Path, workers: int) -> None:
    values = [json.loads(line) for line in rows.read_text().splitlines()]
    named = [type(row)(f"rows.jsonl:{at}", row.values) for at, row in enumerate(rows_of(values), start=1)]
    wanted = encode(recognise(named), TOKENIZER, max_length=24)
    fresh = read(rows, tmp_path / "cache", workers=workers)
    again = read(rows, tmp_path / "cache", workers=workers)
    assert (fresh.reused, again.reused, again.kept) == (False, True, fresh.kept)
    for one in (fresh, again, read(rows, workers=workers)):
        assert same(one.store.set_of(), wanted)
    assert wanted.report.truncated
    assert wanted.report.left_out
    # Whole or nothing: no leftovers beside it.
    assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock") == [fresh.kept.name]
    assert {path.suffix for path in fresh.kept.iterdir()} == {".json", ".i4", ".i8", ".u1"}


def test_bytes_on_disk_do_not_depend_on_workers(rows: Path, tmp_path: Path) -> None:
    one, other = (read(rows, tmp_path / str(count), workers=count).kept for count in (0, 2))
    assert one.name == other.name
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_some_rows_of_a_store(rows: Path) -> None:
    import numpy as np

    store = read(rows).store
    chosen = [0, 7, 8, 200, 299]
    some, whole = store.set_of(np.array(chosen)), store.set_of()
    origins = {f"rows.jsonl:{row + 1}" for row in chosen}
    assert list(some.examples) == [example for example in whole.examples if example.origin in origins]
    assert (some.report.rows, some.report.left_out, some.report.examples) == (5, 1, 4)
    assert some.report.trained_tokens == sum(example.trained for example in some.examples)
    assert some.examples[1:3][1] == some.examples[2] == some.examples[-2]
    none = store.set_of(np.array([], "i8"))
    assert (none.report.examples, none.report.longest, len(none.examples)) == (0, 0, 0)
    assert store.cut() == next(f"rows.jsonl:{e + 1}" for e, n in enumerate(_whole_lengths(rows)) if n > 24)


def _whole_lengths(path: Path) -> list[int]:
    lengths = [0] * 300
    for example in read(path, max_length=1000).store.set_of().examples:
        lengths[int(example.origin.split(":")[1]) - 1] = len(example.input_ids)
    return lengths


def test_every_cause_of_other_tokens_is_another_entry(rows: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    other_template = chat.tokenizer(template=chat.CHAT_TEMPLATE.replace("<|start|>", "<|start|> "))
    more_tokens = chat.tokenizer()
    more_tokens.add_tokens(["river"])
    entries = [
        read(rows, cache),
        read(rows, cache, max_length=23),
        read(rows, cache, encoder=encoder(tokenizer=other_template)),
        read(rows, cache, encoder=encoder(tokenizer=more_tokens)),
        read(rows, cache, encoder=Encoder(encoder().encode, TOKENIZER, {"text": "prompt"}), skip=True),
        read(rows, cache, encoder=Encoder(encoder().encode, TOKENIZER, {}, 10_000)),
        read(rows.rename(tmp_path / "renamed.jsonl"), cache),
    ]
    (tmp_path / "renamed.jsonl").write_text((tmp_path / "renamed.jsonl").read_text().replace("stone", "cloud"))
    entries.append(read(tmp_path / "renamed.jsonl", cache))
    assert not any(entry.reused for entry in entries)
    assert len({entry.kept for entry in entries}) == len(entries)


def test_the_same_file_elsewhere_is_the_same(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "rows.jsonl").write_bytes(rows.read_bytes())
    assert not read(rows, tmp_path / "cache").reused
    assert read(tmp_path / "there" / "rows.jsonl", tmp_path / "cache").reused


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_in_their_order(tmp_path: Path, workers: int) -> None:
    lines = [json.dumps(row) for row in chat.pairs(300)]
    lines[3], lines[4], lines[280] = "{", json.dumps({"text": " "}), json.dumps({"txet": "a"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    cache = tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:4 is not a line of JSON"):
            read(path, cache, workers=workers)
        assert not [entry for entry in cache.iterdir() if entry.suffix != ".lock"]
    for reused in (False, True):
        found = read(path, cache, workers=workers, skip=True)
        assert (found.reused, found.store.bad, len(found.store.rows)) == (reused, 3, 297)
        assert [reason.split(" ")[0].rpartition(":")[2] for reason in found.store.reasons] == ["4", "5", "281"]
    with pytest.raises(DataError, match=r"rows\.jsonl:4 is not a line of JSON"):
        read(path, cache, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_row_counts_before_a_file_that_breaks_off_behind_it(tmp_path: Path, workers: int) -> None:
    import gzip

    content = gzip.compress("\n".join(json.dumps({"text": at}) for at in range(600)).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(content[:-9])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:1 has text = 0; expected text"):
        read(tmp_path / "rows.jsonl.gz", workers=workers)
    with pytest.raises(DataError, match="is not readable as gzip"):
        read(tmp_path / "rows.jsonl.gz", workers=workers, skip=True)


def test_template_errors_are_bad_rows(tmp_path: Path) -> None:
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never') }}{% endif %}" + chat.CHAT_TEMPLATE
    rows = [{"prompt": word, "completion": "red", "system": ""} for word in ("stone", "no", "river")]
    path = chat.written(tmp_path / "rows.jsonl", rows)
    picky = encoder(tokenizer=chat.tokenizer(template=template))
    with pytest.raises(DataError, match=r"^rows\.jsonl:2 does not fit the tokenizer's chat template: never\.$"):
        read(path, encoder=picky)
    assert read(path, encoder=picky, skip=True).store.bad == 1


def test_all_bad_and_no_row_at_all(tmp_path: Path) -> None:
    path = chat.written(tmp_path / "rows.jsonl", [{"txet": "a"}, {"txet": "b"}])
    with pytest.raises(DataError, match=r"None of the 2 rows can be used; the first: rows\.jsonl:1 has the columns"):
        read(path, tmp_path / "cache", skip=True)
    path.write_text("\n")
    with pytest.raises(DataError, match=r"rows\.jsonl holds no rows"):
        read(path, tmp_path / "cache", skip=True)


@pytest.mark.parametrize("harm", ["short", "gone", "index"])
def test_a_broken_entry_is_made_anew(rows: Path, tmp_path: Path, harm: str) -> None:
    first = read(rows, tmp_path / "cache")
    wanted = first.store.set_of().fingerprint
    if harm == "short":
        os.truncate(first.kept / "labels.i4", 400)
    elif harm == "gone":
        (first.kept / "rows.i8").unlink()
    else:
        (first.kept / "index.json").write_text("{")
    with pytest.raises(DataError):
        Store(first.kept)
    again = read(rows, tmp_path / "cache")
    assert (again.reused, again.store.set_of().fingerprint) == (False, wanted)
    assert read(rows, tmp_path / "cache").reused


def _one_of_two(path: Path, cache: Path, answers: Any) -> None:
    def slowly(rows: Any) -> EncodedSet:
        time.sleep(0.001)
        return _encoded(rows, TOKENIZER, max_length=24)

    found = prepared(sources(path), Encoder(slowly, TOKENIZER, {}), {}, cache=cache)
    answers.put((found.reused, found.store.set_of().fingerprint))


def test_of_two_that_need_the_same_one_encodes(rows: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    both = [context.Process(target=_one_of_two, args=(rows, tmp_path / "cache", answers)) for _ in range(2)]
    for process in both:
        process.start()
    found = sorted(answers.get(timeout=60) for _ in both)
    for process in both:
        process.join()
    assert [reused for reused, _ in found] == [False, True]
    assert found[0][1] == found[1][1] == read(rows).store.set_of().fingerprint


def test_what_a_killed_process_left_is_cleared(rows: Path, tmp_path: Path) -> None:
    first = read(rows, tmp_path / "cache")
    left = first.kept.with_name(f".{first.kept.name}.123456.tmp")
    first.kept.rename(left)
    assert not read(rows, tmp_path / "cache").reused
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_done_without(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = read(rows, tmp_path / "file" / "cache")
    assert found.kept is None
    assert "is not kept, because" in found.note
    assert found.store.set_of().fingerprint == read(rows).store.set_of().fingerprint


def test_examples_of_a_program_are_not_kept(tmp_path: Path) -> None:
    found = prepared([in_memory(chat.pairs(4))], encoder(), {}, cache=tmp_path / "cache")
    assert found.kept is None
    assert [example.origin for example in found.store.set_of().examples] == [f"example {at}" for at in (1, 2, 3, 4)]
    place = found.store.folder
    assert place.is_dir()
    del found
    assert not place.exists()


def test_processes_that_are_spawned(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems without fork: all that an encoder is must reach another process."""
    monkeypatch.setattr(processes, "START", "spawn")
    task = functools.partial(Task().encode, processor=TOKENIZER, max_length=24, train_on="completion")
    spawned = read(rows, encoder=Encoder(task, TOKENIZER, {}), workers=1)
    assert same(spawned.store.set_of(), read(rows).store.set_of())


def _die(rows: Any) -> EncodedSet:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_worker_that_is_killed_is_said(rows: Path) -> None:
    with pytest.raises(VeneerError, match="came to an end by itself, mostly for want of memory; use fewer workers"):
        prepared(sources(rows), Encoder(_die, TOKENIZER, {}), {}, cache=None, workers=2)


def test_a_file_that_changes_while_it_is_read_is_not_kept(rows: Path, tmp_path: Path) -> None:
    def touching(given: Any) -> EncodedSet:
        rows.write_text(rows.read_text().replace("stone", "cloud"))
        return _encoded(given, TOKENIZER, max_length=24)

    with pytest.raises(DataError, match=r"rows\.jsonl was changed while it was being read; start again"):
        read(rows, tmp_path / "cache", encoder=Encoder(touching, TOKENIZER, {}))
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.suffix != ".lock"]


def test_a_missing_file_is_an_error_in_the_middle_too(rows: Path) -> None:
    found = sources(rows)
    rows.unlink()
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        prepared(found, encoder(), {}, cache=None)


def test_chunks_are_what_they_are_for_any_encoder(rows: Path) -> None:
    chunks = list(processes.encoded(sources(rows), encoder(), 0))
    assert [len(chunk.columns["rows"]) + len(chunk.bad) for chunk in chunks] == [256, 44]


def test_labels_may_be_fewer_than_tokens(tmp_path: Path) -> None:
    """As those of a classifier."""

    def one_label(rows: Any) -> EncodedSet:
        whole = encode(recognise(rows), TOKENIZER, max_length=24)
        return EncodedSet([Encoded(e.origin, e.input_ids, [7]) for e in whole.examples], whole.report)

    path = chat.written(tmp_path / "rows.jsonl", chat.pairs(3))
    found = prepared(sources(path), Encoder(one_label, TOKENIZER, {}), {}, cache=None).store.set_of()
    plain = encode(recognise(rows_of(chat.pairs(3))), TOKENIZER, max_length=24)
    assert [(e.input_ids, e.labels) for e in found.examples] == [(e.input_ids, [7]) for e in plain.examples]
