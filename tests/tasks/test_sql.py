"""Judging SQL: what is a statement, and which queries find the same in a database."""

from __future__ import annotations

import importlib.util
import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests import chat
from veneer.cli.main import main
from veneer.core.errors import ConfigError, DataError, UsageError
from veneer.tasks import judges, sql
from veneer.tasks import task as tasks
from veneer.tasks.options import TaskOptions

STONES = [("red", 3, 0.1), ("green", 5, 0.2), ("blue", 3, 0.3), ("it's", None, None)]


@pytest.fixture
def stones(tmp_path: Path) -> str:
    """A database of one small table."""
    path = tmp_path / "what is 50%? #1.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute('CREATE TABLE "1-2" (name, "how many", weight)')
        connection.executemany('INSERT INTO "1-2" VALUES (?, ?, ?)', STONES)
        connection.execute("CREATE TABLE odd (name)")
        connection.execute("INSERT INTO odd VALUES (CAST(x'ff00' AS TEXT))")
    connection.close()
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT name FROM stones",
        "select name from stones;",
        """SELECT COUNT("how many") FROM "1-10015132-11" WHERE "School/Club" = 'it''s'""",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "SELECT 1 UNION SELECT 2",
        "VALUES (1)",
        "INSERT INTO stones VALUES (1)",
        "UPDATE stones SET name = 1",
        "DELETE FROM stones",
        "CREATE TABLE stones (name TEXT)",
        "DROP TABLE stones",
        "ALTER TABLE stones ADD name TEXT",
    ],
)
def test_a_statement_parses(text: str) -> None:
    assert sql.parses(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", ";", "stones", "red stones", "The stone is red.", "SELECT name FROM", "SELECT 'a", "SELECT FROM a WHERE"),
        *("SELECT name FROM 1-10015132-11", "SELECT 1; SELECT 2", "```sql\nSELECT 1\n```", "(" * 5000),
        *("SELECT a b c FROM d", "EXPLAIN is a word"),
    ],
)
def test_what_is_no_statement_does_not_parse(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not sql.parses(text)
    assert not caplog.records
    assert logging.getLogger("sqlglot").level == logging.NOTSET


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ('select NAME from "1-2" where "how many" = 3', 'SELECT name FROM "1-2" WHERE "how many" = \'3\' + 0', True),
        ('SELECT name FROM "1-2" WHERE "how many" = 5', 'SELECT name FROM "1-2" WHERE "how many" = 3', False),
        # Rows in any order, but as often.
        ('SELECT "how many" FROM "1-2" ORDER BY 1 DESC', 'SELECT "how many" FROM "1-2"', True),
        ('SELECT DISTINCT "how many" FROM "1-2"', 'SELECT "how many" FROM "1-2"', False),
        ('SELECT "how many" FROM "1-2" UNION ALL SELECT 3', 'SELECT "how many" FROM "1-2"', False),
        # In their order where that is asked.
        ('SELECT name FROM "1-2" ORDER BY weight DESC', 'SELECT name FROM "1-2" ORDER BY weight', False),
        ('SELECT name FROM "1-2" ORDER BY weight + 0', 'SELECT name FROM "1-2" order\nby weight', True),
        ('SELECT name FROM "1-2"', 'SELECT name FROM (SELECT name FROM "1-2" ORDER BY weight DESC)', True),
        ('SELECT name FROM "1-2" ORDER BY 1', "SELECT name FROM \"1-2\" WHERE name <> 'order by'", True),
        ('SELECT name FROM "1-2" ORDER BY 1', 'SELECT name FROM "1-2" -- order by', True),
        # Sums of another order, columns of other names, columns in another order.
        ("SELECT 0.1 + 0.2 + 0.3 AS it", "SELECT 0.3 + 0.2 + 0.1", True),
        ('SELECT MAX(weight) AS it FROM "1-2"', "SELECT 0.3", True),
        ('SELECT "how many", name FROM "1-2"', 'SELECT name, "how many" FROM "1-2"', False),
        ('SELECT name FROM "1-2" WHERE 0', "SELECT 1 WHERE 0", True),
        ("SELECT NULL", "SELECT weight FROM \"1-2\" WHERE name LIKE 'it%'", True),
        ("SELECT name FROM odd", "SELECT * FROM odd", True),
        # No queries.
        ("", "SELECT 1 WHERE 0", False),
        ("-- nothing", "SELECT 1 WHERE 0", False),
        ("SELECT 1; SELECT 1", "SELECT 1", False),
        ("SELECT 1 WHERE", "SELECT 1", False),
        ("SELECT ?", "SELECT 1", False),
        ("SELECT '\0'", "SELECT 1", False),
        ("SELECT '\ud800'", "SELECT 1", False),
        ("The answer is 1.", "SELECT 1", False),
        ("SELECT name FROM nowhere", "SELECT 1", False),
    ],
)
def test_answers_are_right_that_find_the_same(answer: str, reference: str, right: bool, stones: str) -> None:
    assert sql.same_rows(stones, [answer], [[reference]]) == [right]


@pytest.mark.parametrize(
    "answer",
    [
        *('DELETE FROM "1-2"', 'DROP TABLE "1-2"', "CREATE TABLE more (a)", "CREATE TEMP TABLE more (a)", "VACUUM"),
        *('INSERT INTO "1-2" SELECT 1, 2, 3 RETURNING 1', "PRAGMA query_only = OFF", "PRAGMA table_info('1-2')"),
        *("ATTACH DATABASE '{folder}/more.sqlite' AS more", "VACUUM INTO '{folder}/more.sqlite'", "BEGIN"),
        *("SELECT load_extension('{folder}/more')", "SELECT * FROM pragma_table_info('1-2')"),
    ],
)
def test_answers_can_do_nothing_but_read(answer: str, stones: str, tmp_path: Path) -> None:
    before = Path(stones).read_bytes()
    answers = [answer.format(folder=tmp_path), 'SELECT COUNT(*) FROM "1-2"']
    assert sql.same_rows(stones, answers, [["SELECT 4"], ["SELECT 4"]]) == [False, True]
    assert Path(stones).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [Path(stones).name]


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT"


@pytest.mark.parametrize(
    "answer", [f"{ENDLESS} COUNT(*) FROM n", f"{ENDLESS} i FROM n", "SELECT length(zeroblob(2000000000))"]
)
def test_runaway_answers_are_stopped(answer: str, stones: str) -> None:
    assert sql.same_rows(stones, [answer, f"{ENDLESS} i FROM n LIMIT 3"], [["SELECT 1"], ["VALUES (3), (2), (1)"]]) == [
        False,
        True,
    ]


def test_a_reference_that_fails_is_named(stones: str) -> None:
    with pytest.raises(DataError, match=r"reference 'SELECT a FROM nowhere'.*no such table"):
        sql.same_rows(stones, ["SELECT 1"], [["SELECT a FROM nowhere"]])
    with pytest.raises(DataError, match=r"reference 'DELETE FROM odd'.*not authorized"):
        sql.same_rows(stones, ["SELECT 1"], [["DELETE FROM odd"]])


def test_metrics(stones: str) -> None:
    answers, references = (
        ['SELECT MIN(weight) FROM "1-2"', "SELECT 2", "no"],
        [["SELECT 4", "SELECT 0.1"], ["SELECT 3"], ["SELECT 1"]],
    )
    assert judges.judged(["sql_parse"], answers, references)["sql_parse"] == pytest.approx(2 / 3)
    found = judges.judged(["sql_execution", "exact_match"], answers, references, stones)
    assert found == {"sql_execution": pytest.approx(1 / 3), "exact_match": 0}
    assert judges.Judges(("sql_parse", "sql_execution")).goals == {"sql_parse": "max", "sql_execution": "max"}


def test_sqlglot_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"sql_parse needs sqlglot; install it: pip install 'veneer\[metrics\]'"):
        judges.named("sql_parse", ())
    # Python has SQLite.
    assert judges.named("sql_execution", ()) == ("sql_execution",)


def fitted(name: str = "causal_lm", **options: Any) -> Any:
    if name == "translation":
        options["prefix"] = ""
    return tasks.get(name).fitted([], TaskOptions(**options), None)


@pytest.mark.parametrize("name", ["causal_lm", "seq2seq_lm", "translation", "speech_seq2seq"])
def test_what_writes_is_judged_by_a_database(name: str, stones: str) -> None:
    task = fitted(name, judge_by="sql_execution", database=stones)
    assert task.judge(["SELECT 1"], [["SELECT 1"]]) == {"sql_execution": 1}
    back = tasks.get(name).restored(json.loads(json.dumps(task.to_dict())))
    assert back == task
    assert "database" not in fitted(name).to_dict()
    with pytest.raises(ConfigError, match=r"sql_execution, which needs a database"):
        fitted(name, judge_by="sql_execution")
    with pytest.raises(ConfigError, match=r"judged by (exact_match|rouge|bleu|wer).*add sql_execution to judge_by"):
        fitted(name, database=stones)
    with pytest.raises(ConfigError, match="database has no meaning for task seq_cls"):
        fitted("seq_cls", database=stones)


def test_a_database_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("name\nred\n" * 100)
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    (tmp_path / "empty.sqlite").touch()
    for name, said in {
        "nowhere.sqlite": "There is no database",
        ".": "There is no database",
        "text.sqlite": "is not a database of SQLite: file is not a database",
        "empty.sqlite": "has no table",
    }.items():
        with pytest.raises(UsageError, match=said):
            fitted(judge_by="sql_execution", database=str(tmp_path / name))
    # Whoever uses the weights elsewhere may not have it.
    elsewhere = fitted().restored({"judge_by": ["sql_execution"], "database": "nowhere.sqlite"})
    with pytest.raises(UsageError, match=r"There is no database 'nowhere.sqlite'"):
        elsewhere.judge(["SELECT 1"], [["SELECT 1"]])


def table(rows: list[dict[str, str]], path: Path) -> None:
    """A database made of what the rows' own texts say: the table, its columns, and the values asked for."""
    with sqlite3.connect(path) as connection:
        for row in rows:
            name, columns = (line.split(": ")[1] for line in row["prompt"].splitlines()[:2])
            quoted = ", ".join(f'"{column}"' for column in columns.split(", "))
            connection.execute(f'CREATE TABLE IF NOT EXISTS "{name}" ({quoted})')
            asked = row["completion"].rpartition(" = ")[2].strip("'")
            connection.execute(f'INSERT INTO "{name}" VALUES (?, ?)', (f"{asked} stone", asked))
    connection.close()


def test_a_run_is_judged_by_what_its_queries_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "prompt": f"table: 1-2\ncolumns: it, colour\n{colour}",
            "completion": f"""SELECT "it" FROM "1-2" WHERE "colour" = '{colour}'""",
        }
        for colour in ("red", "green")
    ]
    # Red is all that it learns. What is right is said in other words, so that exact match sees nothing.
    others = [{**row, "completion": row["completion"].replace("SELECT", "SELECT ALL")} for row in rows]
    data, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:1] * 24))
    held_out.write_text("".join(f"{json.dumps(row)}\n" for row in others))
    table(rows, tmp_path / "stones.sqlite")
    model, run = chat.saved(tmp_path / "model"), tmp_path / "run"
    flags = ["--data", str(data), "--eval-data", str(held_out), "--judge-by", "exact_match,sql_execution,sql_parse"]
    flags += ["--model", str(model), "--output", str(run), "--method", "full", "--learning-rate", "0.01"]
    flags += ["--samples", "2", "--sample-tokens", "60", "--epochs", "20", "--eval-every", "60"]
    assert main(["train", *flags, "--database", str(tmp_path / "nowhere.sqlite")]) == 2
    assert "There is no database" in capsys.readouterr().err
    assert not run.exists()
    assert main(["train", *flags, "--database", str(tmp_path / "stones.sqlite")]) == 0
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    before, *_, after = [event for event in events if event["event"] == "eval"]
    assert (before["exact_match"], before["sql_execution"], before["sql_parse"]) == (0, 0, 0)
    assert (after["exact_match"], after["sql_execution"]) == (0, 0.5)
    assert after["sql_parse"] >= 0.5

    (tmp_path / "stones.sqlite").rename(tmp_path / "moved.sqlite")
    asked = ["eval", "--model", str(run / "last"), "--data", str(held_out), "--max-new-tokens", "60"]
    assert main([*asked, "--answers", "2"]) == 2
    assert "There is no database" in capsys.readouterr().err
    moved = ["--database", str(tmp_path / "moved.sqlite")]
    assert main([*asked, "--answers", "2", *moved, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sql_execution"] == 0.5
    assert main([*asked, *moved]) == 2
    assert "--answers" in capsys.readouterr().err
