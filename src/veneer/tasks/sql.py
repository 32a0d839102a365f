"""Judging SQL: whether a text is a statement, and whether two queries find the same in a database of SQLite."""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.core.errors import DataError, UsageError

_STEPS_A_CALL, _CALLS = 10_000, 1_000
_LONGEST_VALUE = 1_000_000
"""Bytes of one value: a single step can make a longer one than memory holds."""

_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
# What a query cannot be run for; a ValueError is a text that is no text of SQLite, of half a character or a zero.
_FAILURES = (sqlite3.Error, sqlite3.Warning, ValueError)

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`(?:[^`]|``)*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
_INNERMOST = re.compile(r"\([^()]*\)")
_ORDER = re.compile(r"\border\s+by\b", re.IGNORECASE)


def parses(text: str) -> bool:
    """Whether a text is one statement of SQL in SQLite's dialect: a query, or a change of rows or tables.

    It is sqlglot's parser that says so, which knows nothing of the tables.

    >>> parses("SELECT name FROM stones"), parses("The stones are red.")
    (True, False)
    """
    import sqlglot
    from sqlglot import exp

    # A lone word parses too, as an expression, and is no statement.
    statements = (exp.Query, exp.Values, exp.DML, exp.Create, exp.Drop, exp.Alter)
    try:
        with _quiet("sqlglot"):
            found = [one for one in sqlglot.parse(text, dialect="sqlite") if one is not None]
    except (sqlglot.errors.SqlglotError, RecursionError):
        return False
    return len(found) == 1 and isinstance(found[0], statements)


def same_rows(database: str | Path, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each answer finds the rows that one of its references finds: in its order where that has an ORDER BY.

    Names of columns do not count, and numbers do to 12 digits. An answer that fails, changes something or runs for
    more than ten million steps of SQLite's machine is wrong.

    Raises:
        UsageError: there is no such database.
        DataError: a reference that cannot be executed.
    """
    with contextlib.closing(_opened(database)) as connection:
        return [
            any(_alike(connection, database, answer, one) for one in right)
            for answer, right in zip(answers, references, strict=True)
        ]


def check_database(path: str | Path) -> None:
    """Raise a UsageError unless a file is a database of SQLite with a table."""
    _opened(path).close()


def _alike(connection: sqlite3.Connection, database: str | Path, answer: str, reference: str) -> bool:
    try:
        expected = _rows(connection, reference)
    except _FAILURES as error:
        raise DataError(
            f"The reference {reference!r} cannot be executed on the database {str(database)!r}: {error}."
        ) from None
    try:
        # One more than expected shows that there are too many, of which there may be more than memory holds.
        found = _rows(connection, answer, len(expected) + 1)
    except _FAILURES:
        return False
    return found == expected if _is_ordered(reference) else Counter(found) == Counter(expected)


def _rows(connection: sqlite3.Connection, query: str, most: int | None = None) -> list[tuple[Any, ...]]:
    calls = 0

    def run_away() -> bool:
        nonlocal calls
        calls += 1
        return calls > _CALLS

    connection.set_progress_handler(run_away, _STEPS_A_CALL)
    with contextlib.closing(connection.execute(query)) as cursor:
        if cursor.description is None:
            raise sqlite3.ProgrammingError("it is no query")
        found = cursor.fetchall() if most is None else cursor.fetchmany(most)
    return [tuple(_rounded(value) for value in row) for row in found]


def _rounded(value: Any) -> Any:
    # Another plan adds the same numbers in another order.
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _is_ordered(query: str) -> bool:
    """Whether a query orders what it finds, and not only what a part of it in parentheses does."""
    bare, some = _QUOTED.sub(" ", query), 1
    while some:
        bare, some = _INNERMOST.subn(" ", bare)
    return _ORDER.search(bare) is not None


def _opened(path: str | Path) -> sqlite3.Connection:
    """A connection that can do nothing but read the tables of one file.

    Raises:
        UsageError: it is not a database of SQLite, or has no table.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"There is no database {str(path)!r}; expected a file of SQLite.")
    try:
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise UsageError(f"The database {str(path)!r} cannot be opened: {error}.") from None
    try:
        connection.execute("PRAGMA query_only = ON")
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE type IN ('table', 'view')").fetchone()
    except sqlite3.Error as error:
        connection.close()
        raise UsageError(f"{str(path)!r} is not a database of SQLite: {error}.") from None
    if not tables:
        connection.close()
        raise UsageError(f"The database {str(path)!r} has no table; give one that the references can be executed on.")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
    # Texts as bytes: a table may have some that are no UTF-8.
    connection.text_factory = bytes
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY)
    return connection


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger that tells errors alone."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
