"""The training set and the held-out set of a run: where they come from, and what they are as tokens."""

from __future__ import annotations

import contextlib
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

import numpy as np

from veneer.core.cache import cache_folder
from veneer.core.errors import ConfigError, DataError, UsageError, listed
from veneer.core.records import PartRecord
from veneer.data.cache import Prepared, prepared
from veneer.data.columns import parsed, renamed
from veneer.data.encode import EncodedSet, check_trained, joined
from veneer.data.encoder import Encoder
from veneer.data.mixture import Mixture, Named, weighed
from veneer.data.rows import Row
from veneer.data.sources import (
    HELD_OUT_NAMES,
    IN_MEMORY,
    STDIN,
    TEST_NAMES,
    TRAIN_NAMES,
    Source,
    chosen,
    in_memory,
    sources,
)
from veneer.tasks.limits import longest_input, vocabulary
from veneer.tasks.task import AbstractTask
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PretrainedConfig

Result = TypeVar("Result")

GIVEN = "given by the program"
"""What data is called that a program hands over."""


@final
@dataclass(frozen=True)
class Part:
    """A part of the training data: what is named once."""

    name: str
    weight: float | None
    sources: list[Source]


@final
@dataclass(frozen=True)
class Asked:
    """The data of a run, found but not read."""

    parts: list[Part]
    held_out: list[Source]
    """Empty when a share of the parts is to be held out."""
    notes: list[str]
    """What was decided about it."""
    columns: Mapping[str, str]

    def __iter__(self) -> Iterator[Row]:
        """The rows to train on, bad ones passed over."""
        return self._rows(source for part in self.parts for source in part.sources)

    def measured(self, sets: Sets) -> Iterator[Row]:
        """The rows that are held out, bad ones passed over."""
        if self.held_out:
            return self._rows(self.held_out)
        origins = {example.origin for example in sets.held_out.examples} if sets.held_out is not None else set()
        return (row for row in self if row.origin in origins)

    def _rows(self, found: Iterable[Source]) -> Iterator[Row]:
        for row in (row for source in found for row in source.read()):
            if isinstance(row, Row) and all(column in row.values for column in self.columns.values()):
                yield renamed(row, self.columns) if self.columns else row


@final
@dataclass(frozen=True)
class Sets:
    """The data of a run as tokens."""

    train: EncodedSet
    held_out: EncodedSet | None
    mixture: Mixture | None
    """How the parts of the training set are mixed, when they are weighed."""
    parts: tuple[PartRecord, ...]
    notes: tuple[str, ...]


def asked_for(
    config: RunConfig,
    task: AbstractTask,
    train_rows: Iterable[Mapping[str, Any]] | None,
    eval_rows: Iterable[Mapping[str, Any]] | None,
) -> Asked:
    """Find the data that a config or a program names.

    Raises:
        ConfigError: it is named in a way that has no meaning.
        UsageError: there is no such data.
        DataError: a list of examples is empty.
    """
    columns = parsed(config.columns, task.columns) if config.columns is not None else {}
    held_out = [] if eval_rows is None else [in_memory(eval_rows)]
    if train_rows is not None:
        found, notes = [Part(GIVEN, None, [in_memory(train_rows)])], list[str]()
    else:
        found, own, notes = _named(config, look=eval_rows is None)
        held_out = held_out or own
    if eval_rows is None and config.eval_data:
        held_out = _held_out_of(config.eval_data)
    trained = {source.place for part in found for source in part.sources} - {IN_MEMORY}
    both = [source.place for source in held_out if source.place in trained]
    if both:
        notes.append(f"{listed(both)} is trained on and held out: what is measured there is no measure of new data.")
    return Asked(found, held_out, notes, columns)


def _named(config: RunConfig, *, look: bool) -> tuple[list[Part], list[Source], list[str]]:
    """The parts of the training data, what is to be held out of the same folders, and what was decided about it."""
    if config.data is None:
        raise ConfigError("The run config has no data: expected a .jsonl, .csv or .parquet file, or a folder of them.")
    _check_stdin(config)
    parts: list[Part] = []
    held_out: list[Source] = []
    notes = []
    for name, weight in weighed(config.data):
        files = sources(name)
        named = chosen(files, TRAIN_NAMES)
        kept = chosen(files, HELD_OUT_NAMES) if named and look and not config.eval_data else []
        if named and len(files) > len(named):
            others = [file.name for file in files if file not in named and file not in kept]
            notes.append(
                f"Of {name}, {listed(f.name for f in named)} is trained on, "
                f"{listed(f.name for f in kept) or 'nothing'} is held out, {listed(others) or 'nothing'} is left alone."
            )
        parts.append(Part(name, weight, named or files))
        held_out += kept
    _tell_apart(parts)
    return parts, held_out, notes


def _tell_apart(parts: list[Part]) -> None:
    """Give files of one name in different parts their whole path as a name, and refuse what is in two parts."""
    every = [source for part in parts for source in part.sources]
    places = Counter(source.place for source in every)
    twice = next((place for place, times in places.items() if times > 1), None)
    if twice is not None:
        raise ConfigError(f"data names {twice!r} twice; expected each file in one part.")
    renamed_sources = iter(sources(every))
    for part in parts:
        part.sources[:] = [next(renamed_sources) for _ in part.sources]


def _held_out_of(names: str | list[str]) -> list[Source]:
    """The held-out data that is named; of a folder or data set that has its own, that alone."""
    each = map(sources, [names] if isinstance(names, str) else names)
    taken = [chosen(files, HELD_OUT_NAMES) or chosen(files, TEST_NAMES) or files for files in each]
    return [file for files in taken for file in files]


def _check_stdin(config: RunConfig) -> None:
    from accelerate import PartialState

    names = [name for given in (config.data, config.eval_data) if given for name, _ in weighed(given)]
    if names.count(STDIN) > 1:
        raise ConfigError(f"data {STDIN} (stdin) is given twice, and can be read once; write it to a file.")
    if STDIN in names and PartialState().num_processes > 1:
        raise UsageError(f"data {STDIN} (stdin) reaches one process alone; for several, write it to a file.")


def data_name(data: Named | None) -> str:
    """What to call training data in a sentence."""
    if data is None:
        return GIVEN
    each = [(Path(name).name, weight) for name, weight in weighed(data)]
    return listed(name if weight is None else f"{name} (weight {weight:g})" for name, weight in each)


def both_sets(
    config: RunConfig,
    task: AbstractTask,
    asked: Asked,
    tokenizer: Any,
    model_config: PretrainedConfig | None,
    console: Console | None = None,
) -> Sets:
    """Both sets as tokens, none longer than the model takes and none outside of its vocabulary.

    Raises:
        ConfigError, UsageError, DataError: see ``prepared``; no token to train; nothing to hold out for ``patience``.
    """
    reader = Reader(config, task, asked.columns, tokenizer, model_config, console)
    read = [reader.read(part.sources) for part in asked.parts]
    apart = [_in_held_out(lambda: reader.read(asked.held_out))] if asked.held_out else []
    everything = [*read, *apart]
    if apart:
        train, held_out = [one.store.set_of() for one in read], [one.store.set_of() for one in apart]
    else:
        train, held_out = _split(read, config)
    whole, measured = joined(train), joined(held_out) if held_out else None
    check_trained(whole.report, reader.max_length)
    if measured is not None:
        _in_held_out(lambda: check_trained(measured.report, reader.max_length))
    elif config.patience is not None:
        raise ConfigError("patience has no meaning when nothing is held out; give eval_data or eval_fraction.")
    mixture, parts, said = mix(asked.parts, train)
    nothing = [] if measured is not None else ["Nothing is held out, so no best is kept, only the last."]
    notes = [*nothing, *bad_rows(everything), *reader.notes(everything), *_reused(everything), *said]
    return Sets(whole, measured, mixture, parts, (*asked.notes, *notes))


def _in_held_out(act: Callable[[], Result]) -> Result:
    try:
        return act()
    except DataError as error:
        raise DataError(f"In the held-out data: {error}") from None


@final
class Reader:
    """Reads data as a run's config says, for one model."""

    def __init__(
        self,
        config: RunConfig,
        task: AbstractTask,
        columns: Mapping[str, str],
        tokenizer: Any,
        model_config: PretrainedConfig | None,
        console: Console | None = None,
    ) -> None:
        self.config, self.console = config, console
        self.limit = longest_input(model_config) if model_config is not None else None
        self.max_length = min(config.max_length, self.limit or config.max_length)
        how = {"max_length": self.max_length, "train_on": config.train_on, "truncate": config.truncate}
        self.how = {"task": config.task, "fitted": task.to_dict(), **how}
        self.keeps = task.keeps
        known = vocabulary(model_config) if model_config is not None else None
        encode = functools.partial(task.encode, processor=tokenizer, **how)
        self.encoder = Encoder(encode, tokenizer, columns, known)

    def read(self, found: Sequence[Source]) -> Prepared:
        """Some sources as sequences. See ``prepared``."""
        cache = _cache(self.config.cache) if self.keeps else None
        with _counting(self.console) as on_rows:
            return prepared(
                found,
                self.encoder,
                self.how,
                cache=cache,
                workers=self.config.workers,
                skip=self.config.on_bad_row == "skip",
                on_rows=on_rows,
            )

    def notes(self, read: Sequence[Prepared]) -> list[str]:
        """What there is to say of data that was read."""
        said = list(dict.fromkeys(one.note for one in read if one.note))
        first = next(filter(None, (one.store.cut() for one in read)), None)
        if first is not None and self.limit is not None and self.limit < self.config.max_length:
            said.append(
                f"The model takes {self.limit:,} tokens at most, so examples are cut there, not at "
                f"{self.config.max_length:,}: {first} is the first that is longer."
            )
        return said


def _cache(given: str) -> Path | None:
    """The folder that a config's ``cache`` means."""
    if given == "off":
        return None
    if given != "auto":
        return Path(given).expanduser()
    # An account may have no home, as in some containers.
    with contextlib.suppress(RuntimeError):
        return cache_folder() / "data"
    return None


@contextlib.contextmanager
def _counting(console: Console | None) -> Iterator[Callable[[int], object]]:
    """A line on a terminal that counts the rows which are done, gone when all are."""
    if console is None or not console.is_terminal:
        yield lambda count: None
        return
    with console.status("encoding ...") as status:
        yield lambda count: status.update(f"encoding ... {count:,} rows")


def bad_rows(read: Sequence[Prepared]) -> list[str]:
    """A sentence on the bad rows that are left out, if there are any."""
    reasons = [reason for one in read for reason in one.store.reasons]
    count = sum(one.store.bad for one in read)
    return [f"{count:,} bad rows are left out: {' '.join(reasons[:3])}{' ...' if count > 3 else ''}"] if count else []


def _reused(read: Sequence[Prepared]) -> list[str]:
    kept = [str(one.kept) for one in read if one.reused]
    return [f"Encoded data is taken from the cache: {listed(kept, most=2)}."] if kept else []


def _split(read: Sequence[Prepared], config: RunConfig) -> tuple[list[EncodedSet], list[EncodedSet]]:
    """Hold out a share of the rows, at least one, chosen by the seed; both parts stay in order.

    Of a mixture, the same share of each part with more than one row.
    """
    counts = [len(one.store.rows) for one in read]
    weighed_parts = config.data is not None and weighed(config.data)[0][1] is not None and len(counts) > 1
    out = [set[int]() for _ in counts]
    if weighed_parts:
        out = [_drawn(count, config) for count in counts]
    else:
        begin = 0
        whole = _drawn(sum(counts), config)
        for at, count in enumerate(counts):
            out[at] = {index - begin for index in whole if begin <= index < begin + count}
            begin += count
    drawn = [np.array(sorted(some), "<i8") for some in out]
    train = [one.store.set_of(np.delete(np.arange(n), some)) for one, n, some in zip(read, counts, drawn, strict=True)]
    return train, [one.store.set_of(some) for one, some in zip(read, drawn, strict=True) if len(some)]


def _drawn(count: int, config: RunConfig) -> set[int]:
    if config.eval_fraction == 0 or count < 2:
        return set()
    some = min(count - 1, max(1, round(count * config.eval_fraction)))
    return set(random.Random(config.seed).sample(range(count), some))


def mix(parts: Sequence[Part], sets: Sequence[EncodedSet]) -> tuple[Mixture | None, tuple[PartRecord, ...], list[str]]:
    """How parts are mixed, if they are weighed; each with its counts; and what there is to say of the mixture.

    Raises:
        DataError: a part has a weight, and nothing to train.
    """
    weights = [part.weight for part in parts if part.weight is not None]
    for part, one in zip(parts, sets, strict=True):
        if part.weight is not None and not one.report.examples:
            raise DataError(f"{part.name} has no token to train, so it cannot have the weight {part.weight:g}.")
    mixture = Mixture([len(one.examples) for one in sets], weights) if weights else None
    taken = mixture.taken if mixture else [len(one.examples) for one in sets]
    records = tuple(
        PartRecord(part.name, part.weight, one.report.rows, one.report.examples, count, one.fingerprint)
        for part, one, count in zip(parts, sets, taken, strict=True)
    )
    if mixture is None:
        return None, records, []
    each = [
        f"{one.taken:,} of {one.name} ({one.taken / one.examples:.2f} times its {one.examples:,})" for one in records
    ]
    return mixture, records, [f"Each pass has {sum(taken):,} examples: {listed(each)}."]
