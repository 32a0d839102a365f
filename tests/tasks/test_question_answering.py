from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import words
from veneer import AutoPeftModelForQuestionAnswering
from veneer.cli.main import main
from veneer.core.errors import ConfigError, DataError
from veneer.data.encode import Encoded
from veneer.data.sources import rows_of
from veneer.tasks import task as tasks
from veneer.tasks.options import TaskOptions
from veneer.tasks.question_answering import Task
from veneer.train.config import RunConfig
from veneer.train.loop import train

HOW: dict[str, Any] = {"max_length": 16, "train_on": "completion"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words.saved(tmp_path_factory.mktemp("bert"))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def squad(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as SQuAD's own file has them."""
    qas = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": f"{at}",
                    "question": row["question"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(*row["answers"].values(), strict=True)
                    ],
                }
            ],
        }
        for at, row in enumerate(rows)
    ]
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "t", "paragraphs": qas}]}))
    return path


def fitted(rows: list[dict[str, Any]], **options: Any) -> Task:
    found = tasks.get("question_answering").fitted(rows_of(rows), TaskOptions(stride=4, **options), words.config())
    assert isinstance(found, Task)
    return found


def test_the_loss_is_that_of_transformers(bert: Path) -> None:
    task = fitted(words.questions())
    model, processor = task.model(str(bert)).eval(), task.processor(str(bert))
    encoded = task.encode(rows_of(words.questions()), processor, **HOW)
    assert encoded.report.examples > encoded.report.rows == 24
    batch = task.collate(encoded.examples[:9], processor)
    found = task.loss(model, batch)
    assert torch.allclose(found.total / task.units(batch), model(**batch).loss, atol=1e-6)
    assert found.tally.units == 9


def brute(task: Task, model: Any, row: dict[str, Any], processor: Any) -> tuple[str, int | None]:
    """The best answer to a question by trying all spans, as transformers' example for SQuAD does."""
    tokens = processor(
        row["question"],
        row["context"],
        truncation="only_second",
        max_length=16,
        stride=4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best, nothing = (-math.inf, "", 0), math.inf
    for at, ids in enumerate(tokens["input_ids"]):
        with torch.no_grad():
            kinds = torch.tensor([tokens["token_type_ids"][at]])
            out = model(input_ids=torch.tensor([ids]), token_type_ids=kinds)
        start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
        nothing = min(nothing, start[0] + end[0])
        inside = [place for place, of in enumerate(tokens.sequence_ids(at)) if of == 1]
        for one in inside:
            for two in inside:
                if one <= two < one + 30 and start[one] + end[two] > best[0]:
                    a, b = tokens["offset_mapping"][at][one][0], tokens["offset_mapping"][at][two][1]
                    best = (start[one] + end[two], row["context"][a:b], a)
    return ("", None) if task.unanswerable and nothing > best[0] else best[1:]


@pytest.mark.parametrize("unanswerable", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_predictions_are_the_best_spans_of_all_windows(bert: Path, unanswerable: bool, batch_size: int) -> None:
    rows = words.questions(unanswerable=unanswerable)
    task = fitted(rows)
    assert task.unanswerable == unanswerable
    torch.manual_seed(22)
    model, processor = task.model(str(bert)).eval(), task.processor(str(bert))
    examples = task.encode(rows_of(rows), processor, **HOW, labelled=False).examples
    said = tasks.predict(task, model, examples, processor, batch_size=batch_size, device="cpu")
    assert [one["origin"] for one in said] == [f"example {at}" for at in range(1, 25)]
    assert [(one["text"], one["start"]) for one in said] == [brute(task, model, row, processor) for row in rows]
    assert all(0 < one["score"] <= 1 for one in said)
    assert all(("no_answer" in one) == unanswerable for one in said)
    if unanswerable:
        assert 0 < sum(not one["text"] for one in said) < 24


def window(text: str, spans: list[list[int]], at: int = 0) -> Encoded:
    return Encoded("x", [2, 5, 3, *[6] * len(spans), 3], [], {"first": 3, "offsets": spans, "text": text, "at": at})


def read(logits: list[list[float]], example: Encoded) -> Any:
    return Task().read(torch.tensor([logits]), [example], words.tokenizer())[0]


def test_no_answer_is_weighed_against_the_best_span() -> None:
    one = window("so good", [[0, 2], [3, 7]])
    spans = [[0.0, 0, 0, 1.0, 2.0, 0], [0.0, 0, 0, 0.5, 3.0, 0]]
    assert Task().join([read(spans, one)])["text"] == "good"
    sure = [[3.0, *spans[0][1:]], [2.5, *spans[1][1:]]]
    assert Task().join([read(sure, one)]) | {"score": 0, "no_answer": 0} == {
        "text": "",
        "start": None,
        "score": 0,
        "no_answer": 0,
    }
    assert Task(unanswerable=False).join([read(sure, one)])["text"] == "good"
    # One window that is not sure of nothing is enough.
    assert Task().join([read(sure, one), read(spans, window("so bad", [[0, 2], [3, 6]], 8))])["text"] in ("good", "bad")


def test_spans_are_in_order_and_not_too_long() -> None:
    many = [[2 * at, 2 * at + 1] for at in range(40)]
    logits = [[0.0] * 44, [0.0] * 44]
    logits[0][3 + 5], logits[1][3 + 2], logits[1][3 + 36] = 9.0, 8.0, 7.0
    (best, *_) = read(logits, window("a " * 40, many))["spans"]
    # The end before the start is none, and that of 32 tokens is too long.
    assert best["start"] == 10
    assert len(best["text"].split()) <= 30
    assert best["logit"] == 9.0


def test_what_two_windows_share_is_one_span_and_spaces_are_no_part_of_it() -> None:
    first, second = window("so  good ", [[0, 2], [2, 9]]), window(" good ", [[0, 6]], 3)
    spans = (
        read([[0.0, 0, 0, 0, 5, 0], [0.0, 0, 0, 0, 5, 0]], first),
        read([[0.0, 0, 0, 4, 0], [0.0, 0, 0, 4, 0]], second),
    )
    assert spans[0]["spans"][0] == {"text": "good", "start": 4, "logit": 10.0}
    assert spans[1]["spans"][0] == {"text": "good", "start": 4, "logit": 8.0}
    joined = Task(unanswerable=False).join(spans)
    logits = torch.tensor([10.0, 5.0, 0.0])
    assert joined == {"text": "good", "start": 4, "score": pytest.approx(float(logits.softmax(0)[0]))}


def test_figures_count_rows_and_nothing_for_nothing() -> None:
    task = Task()
    rows = [("a", "the good film", ["good film", "so"]), ("b", "very bad film", ["bad"]), ("c", "", []), ("d", "a", [])]
    said, examples = [], []
    for origin, text, right in rows:
        spans = [{"text": text, "start": 0, "logit": 1.0}] if text else []
        said += [{"spans": spans, "nothing": 0.0}, {"spans": [], "nothing": 2.0}]
        examples += [Encoded(origin, [1], [0, 0], {"answers": right})] * 2
    found = task.metrics(tasks.Tally(8.0, 8), said, examples)
    # Articles do not count, so that "a" is nothing too: SQuAD's own rule.
    assert found["exact_match"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert found["loss"] == 1.0
    details = task.details(said, examples)
    assert details["answerable"] == {"exact_match": 0.5, "f1": pytest.approx(0.75), "examples": 2}
    assert details["unanswerable"] == {"exact_match": 1.0, "f1": 1.0, "examples": 2}
    assert task.details(said[:2], examples[:2]) == {}


METHODS: list[dict[str, Any]] = [
    {"method": "full"},
    {"method": "head"},
    {"r": 4, "learning_rate": 0.03},
    {"use_dora": True, "learning_rate": 0.03},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m)))
def test_every_method_learns_and_comes_back(method: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    data = squad(tmp_path / "train.json", words.questions())
    config = RunConfig(
        model=str(bert),
        data=str(data),
        output=str(tmp_path / "run"),
        task="question_answering",
        eval_data=str(data),
        max_length=16,
        stride=4,
        max_steps=40,
        eval_every=40,
        best_metric="f1",
        **{"learning_rate": 0.01, **method},
    )
    result = train(config)
    before, after = result.record.held_out_before, result.record.held_out_after
    assert before is not None
    assert after is not None
    assert after["loss"] < before["loss"]
    if method != {"method": "head"}:
        assert after["f1"] > 0.7
    kept = json.loads((tmp_path / "run" / "last" / "task.json").read_text())
    assert kept == {"task": "question_answering", "stride": 4, "unanswerable": True}
    adapted = "method" not in method
    given = ["--adapter", str(tmp_path / "run")] if adapted else ["--model", str(tmp_path / "run" / "last")]
    plain = [{"question": row["question"], "context": row["context"]} for row in words.questions(6)]
    new, out = written(tmp_path / "new.jsonl", plain), tmp_path / "said.jsonl"
    length = ["--max-length", "16"]
    assert main(["predict", *given, "--data", str(new), "--output", str(out), *length]) == 0
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["origin"] for one in said] == [f"new.jsonl:{at}" for at in range(1, 7)]
    for one, row in zip(said, plain, strict=True):
        assert one["start"] is None or row["context"][one["start"] :].startswith(one["text"])
    if adapted:
        AutoPeftModelForQuestionAnswering.from_pretrained(tmp_path / "run" / "last")


def test_merged_it_predicts_the_same(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "train.jsonl", words.questions())
    flags = ["--task", "question_answering", "--max-steps", "5", "--learning-rate", "0.01", "--stride", "5"]
    flags += ["--max-length", "20"]
    assert main(["train", "--model", str(bert), "--data", str(data), "--output", str(tmp_path / "run"), *flags]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(bert), "--adapter", str(tmp_path / "run"), "--output", str(merged)]) == 0
    outputs, figures = [], []
    for given in (["--adapter", str(tmp_path / "run")], ["--model", str(merged)]):
        asked = [*given, "--data", str(data), "--max-length", "20", "--json"]
        capsys.readouterr()
        assert main(["predict", *asked]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["predictions"])
        assert main(["eval", *asked]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    for one, other in zip(*outputs, strict=True):
        assert (one["text"], one["start"]) == (other["text"], other["start"])
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)
    assert figures[0]["f1"] == figures[1]["f1"]
    assert figures[0]["answerable"]["examples"] == 16
    transformers.AutoModelForQuestionAnswering.from_pretrained(merged)


def test_a_head_for_other_labels_is_made_anew(bert: Path, tmp_path: Path) -> None:
    transformers.AutoModelForTokenClassification.from_pretrained(bert, num_labels=5).save_pretrained(tmp_path)
    assert Task().model(str(tmp_path)).qa_outputs.out_features == 2


def test_what_is_wrong_is_named(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = words.questions()
    rows[6] = {**rows[6], "answers": {"text": ["paris"], "answer_start": [0]}}
    data, output = written(tmp_path / "train.jsonl", rows), str(tmp_path / "run")
    asked = ["train", "--model", str(bert), "--data", str(data), "--output", output, "--task", "question_answering"]
    assert main([*asked, "--max-steps", "1"]) == 1
    assert "train.jsonl:7 has the answer 'paris' at character 0" in capsys.readouterr().err
    assert main([*asked, "--max-steps", "1", "--on-bad-row", "skip"]) == 0
    assert "1 bad rows are left out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="labels has no meaning for task question_answering"):
        fitted(words.questions(), labels="a,b")
    with pytest.raises(ConfigError, match="stride has no meaning for task seq_cls"):
        tasks.get("seq_cls").fitted([], TaskOptions(stride=4), words.config())
    with pytest.raises(ConfigError, match="stride"):
        RunConfig(model="m", data="d", output="o", stride=-1)
    with pytest.raises(DataError, match="example 1 has no question"):
        Task().check(rows_of([{"context": "a"}])[0], labelled=False)
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ConfigError, match="expected a fast tokenizer"):
        Task().prepare([], slow)


def test_the_preview_shows_the_answer_in_its_place() -> None:
    rows, tokenizer = words.questions(3), words.tokenizer()
    examples = Task().encode(rows_of(rows), tokenizer, **{**HOW, "max_length": 64}).examples
    shown = [Task().preview(example, tokenizer) for example in examples]
    assert [[piece.text for piece in one if piece.trained] for one in shown] == [["paris"], ["film"], [" no answer"]]
    assert "".join(piece.text for piece in shown[0]).endswith(rows[0]["context"])
