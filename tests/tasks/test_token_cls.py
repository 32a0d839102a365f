from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from seqeval import metrics as truth

from tests import words
from veneer.cli.main import main
from veneer.core.errors import ConfigError, DataError
from veneer.data.encode import IGNORED
from veneer.data.sources import rows_of
from veneer.tasks import task as tasks
from veneer.tasks.options import TaskOptions


def sentences(count: int = 16) -> list[dict[str, Any]]:
    """Words with the tags of places, one of which is cut into pieces."""
    rows = []
    for at in range(count):
        place, tags = (["paris"], ["B-place"]) if at % 2 else (["new", "paris"], ["B-place", "I-place"])
        rows.append({"tokens": ["i", "saw", *place, *["and"] * (at % 3)], "tags": ["O", "O", *tags, *["O"] * (at % 3)]})
    return rows


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words.saved(tmp_path_factory.mktemp("bert"))


def fitted(rows: list[dict[str, Any]], **options: Any) -> Any:
    return tasks.get("token_cls").fitted(rows_of(rows), TaskOptions(**options), words.config())


def test_the_first_token_of_each_word_is_trained(bert: Path) -> None:
    rows = [{"tokens": ["i", "saw", "parisly"], "tags": ["O", "O", "B-place"]}]
    task = fitted(rows)
    tokenizer = task.processor(str(bert))
    (example,) = task.encode(rows_of(rows), tokenizer, max_length=64, train_on="all").examples
    assert tokenizer.convert_ids_to_tokens(example.input_ids) == ["[CLS]", "i", "saw", "paris", "##ly", "[SEP]"]
    place, other = task.labels.names.index("B-place"), task.labels.names.index("O")
    assert example.labels == [IGNORED, other, other, place, IGNORED, IGNORED]
    shown = task.preview(example, tokenizer)
    assert "".join(piece.text for piece in shown if piece.trained) == "B-place "


def test_the_loss_is_that_of_transformers(bert: Path) -> None:
    task = fitted(sentences())
    model, tokenizer = task.model(str(bert)).eval(), task.processor(str(bert))
    examples = task.encode(rows_of(sentences()), tokenizer, max_length=64, train_on="all").examples
    batch = task.collate(examples, tokenizer)
    found = task.loss(model, batch)
    torch.testing.assert_close(found.total / task.units(batch), model(**batch).loss)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_figures_are_those_of_seqeval(batch_size: int, bert: Path) -> None:
    rows = sentences()
    task = fitted(rows)
    torch.manual_seed(2)
    model, tokenizer = task.model(str(bert)), task.processor(str(bert))
    examples = task.encode(rows_of(rows), tokenizer, max_length=64, train_on="all").examples
    found = tasks.measure(task, model, examples, tokenizer, batch_size=batch_size, device="cpu")
    said = tasks.predict(task, model, examples, tokenizer, batch_size=batch_size, device="cpu")
    right, guessed = [row["tags"] for row in rows], [one["tags"] for one in said]
    assert [one["tokens"] for one in said] == [row["tokens"] for row in rows]
    assert found.metrics["f1"] == pytest.approx(truth.f1_score(right, guessed, zero_division=0))
    assert found.metrics["precision"] == pytest.approx(truth.precision_score(right, guessed, zero_division=0))
    assert found.metrics["token_accuracy"] == pytest.approx(truth.accuracy_score(right, guessed))
    assert found.details["per_label"]["place"]["examples"] == len(rows)


def test_tags_without_spans_have_no_entities() -> None:
    assert set(fitted([{"tokens": ["a", "b"], "tags": ["NOUN", "VERB"]}]).goals) == {"loss", "token_accuracy"}
    assert set(fitted([{"tokens": ["a", "b"], "tags": [0, 1]}]).goals) == {"loss", "token_accuracy"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, {}, "example 2 has 2 tokens and 1 tags"),
        ({"tokens": ["a"], "tags": ["B-plase"]}, {"labels": "O,B-place"}, "example 2 has tags = 'B-plase'"),
        ({"tokens": "a b", "tags": ["O"]}, {}, "example 2 has no list of tokens"),
        ({"tokens": [1], "tags": ["O"]}, {}, "example 2 has tokens = 1; expected text"),
    ],
)
def test_a_row_that_is_wrong_is_named(row: dict[str, Any], options: dict[str, Any], message: str, bert: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["O", "B-place"]}, row]

    def encoded() -> None:
        task = fitted(rows, **options)
        task.encode(rows_of(rows), task.processor(str(bert)), max_length=64, train_on="all")

    with pytest.raises(DataError, match=message):
        encoded()


def test_a_slow_tokenizer_is_refused(bert: Path) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="Slow does not say which word a token is of"):
        fitted(sentences()).prepare([], Slow())


def test_trained_saved_and_merged_it_tags_the_same(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"words": row["tokens"], "ner": row["tags"]}) + "\n" for row in sentences()))
    flags = ["--task", "token_cls", "--columns", "tokens=words,tags=ner", "--learning-rate", "0.03"]
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    more = ["--eval-data", str(data), "--max-steps", "60", "--eval-every", "60", "--best-metric", "f1"]
    assert main(["train", "--model", str(bert), "--data", str(data), "--output", run, *flags, *more]) == 0
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["held_out_after"]["f1"] > record["held_out_before"]["f1"]
    assert record["details"]["per_label"]["place"]["examples"] == 16
    assert main(["merge", "--model", str(bert), "--adapter", run, "--output", merged]) == 0
    found = []
    for given in (["--adapter", run], ["--model", merged]):
        capsys.readouterr()
        assert main(["predict", *given, "--data", str(data), "--columns", "tokens=words", "--json"]) == 0
        found.append([one["tags"] for one in json.loads(capsys.readouterr().out)["predictions"]])
    assert found[0] == found[1]
