from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sklearn import metrics as truth

from tests import chat, words
from veneer import AutoPeftModelForSequenceClassification
from veneer.cli.main import main
from veneer.core.errors import ConfigError, DataError, UsageError
from veneer.data.sources import rows_of
from veneer.report.confusion import confusion_plot
from veneer.tasks import task as tasks
from veneer.tasks.heads import untrained_pooler
from veneer.tasks.labels import Labels
from veneer.tasks.options import TaskOptions
from veneer.train.config import RunConfig
from veneer.train.loop import train


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words.saved(tmp_path_factory.mktemp("bert"))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fitted(rows: list[dict[str, Any]], **options: Any) -> Any:
    return tasks.get("seq_cls").fitted(rows_of(rows), TaskOptions(**options), words.config())


KINDS = {
    "single": (words.reviews(), {}),
    "multi": (
        [{"text": r["text"], "label": [r["label"], "film"][: 1 + i % 2]} for i, r in enumerate(words.reviews())],
        {},
    ),
    "regression": ([{"text": r["text"], "label": 0.5 + (r["label"] == "positive")} for r in words.reviews()], {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(kind: str, bert: Path) -> None:
    rows, options = KINDS[kind]
    task = fitted(rows, **options)
    assert task.labels.kind == kind
    model = task.model(str(bert)).eval()
    processor = task.processor(str(bert))
    examples = task.encode(rows_of(rows), processor, max_length=64, train_on="completion").examples[:6]
    batch = task.collate(examples, processor)
    found = task.loss(model, batch)
    expected = model(**batch).loss
    torch.testing.assert_close(found.total / task.units(batch), expected)
    assert found.tally.units == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_figures_are_those_of_scikit_learn(kind: str, batch_size: int, bert: Path) -> None:
    rows, _ = KINDS[kind]
    task = fitted(rows)
    torch.manual_seed(1)
    model, processor = task.model(str(bert)), task.processor(str(bert))
    examples = task.encode(rows_of(rows), processor, max_length=64, train_on="completion").examples
    found = tasks.measure(task, model, examples, processor, batch_size=batch_size, device="cpu")
    said = tasks.predict(task, model, examples, processor, batch_size=batch_size, device="cpu")
    assert set(found.metrics) == set(task.goals)
    if kind == "single":
        right, guessed = [row["label"] for row in rows], [one["label"] for one in said]
        assert found.metrics["accuracy"] == pytest.approx(truth.accuracy_score(right, guessed))
        assert found.metrics["f1_macro"] == pytest.approx(truth.f1_score(right, guessed, average="macro"))
        assert found.metrics["mcc"] == pytest.approx(truth.matthews_corrcoef(right, guessed))
        names = list(task.labels.names)
        counts = found.details["confusion"]["counts"]
        assert counts == truth.confusion_matrix(right, guessed, labels=names).tolist()
        assert all(abs(sum(one["scores"].values()) - 1) < 1e-5 for one in said)
    if kind == "regression":
        errors = [abs(one["value"] - row["label"]) for one, row in zip(said, rows, strict=True)]
        assert found.metrics["mean_absolute_error"] == pytest.approx(sum(errors) / len(errors))


def test_a_pooler_that_was_never_trained_is_told(bert: Path, tmp_path: Path) -> None:
    body = transformers.BertModel.from_pretrained(bert)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if name.endswith("bias") and "pooler" not in name:
                parameter.normal_()
    body.save_pretrained(tmp_path / "made")
    words.tokenizer().save_pretrained(tmp_path / "made")

    def notes(model: Path, **settings: Any) -> list[str]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        config = RunConfig(output=str(out), model=str(model), task="seq_cls", max_steps=1, **settings)
        return [note for note in train(config, train_rows=words.reviews()).record.notes if "pooler" in note]

    made = tmp_path / "made"
    assert notes(made) == [
        "The head reads bert.pooler, which looks as if it had never been trained: its bias is zero. "
        "--modules-to-save pooler trains it too."
    ]
    assert notes(made, modules_to_save=["pooler"], target_modules=["query"]) == []
    assert notes(made, method="full") == []
    # Where no bias has learned, none gives anything away; and vectors are made without it.
    assert notes(bert) == []
    assert untrained_pooler(body) is None


def test_numbers_as_texts_are_names_unless_a_regression_is_asked_for() -> None:
    rows = [{"text": "a", "label": "10"}, {"text": "b", "label": "9"}, {"text": "c", "label": "1.5"}]
    assert fitted(rows).labels.names == ("9", "10", "1.5")
    assert fitted(rows, problem="regression").labels == Labels((), "regression")
    assert fitted(rows, problem="single").labels.kind == "single"
    assert fitted([*rows, {"text": "d", "label": "x"}], problem="multi").labels.kind == "multi"


def test_labels_are_put_in_the_order_that_is_given() -> None:
    assert fitted(words.reviews()).labels.names == ("negative", "positive")
    assert fitted(words.reviews(), labels="positive, negative,mixed").labels.names == ("positive", "negative", "mixed")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"text": "a", "label": "postive"},
            {"labels": "positive,negative"},
            "example 1 has label = 'postive'.*positive",
        ),
        ({"text": "a", "lable": "x"}, {}, "example 1 has no label; its columns are text, lable. Did you mean"),
        ({"text": "a", "label": ["x", "x"]}, {}, "a label twice"),
        ({"text": "a", "label": {}}, {}, "expected a label"),
        ({"text": "a", "label": "high"}, {"problem": "regression"}, "example 1 has label = 'high'; expected a number"),
        ({"text": "a", "label": "x"}, {}, "one label only"),
    ],
)
def test_a_row_that_is_wrong_is_named(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fitted([row], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "one"}, "at least two names"),
        ({"labels": "a,a"}, "each once"),
        ({"class_weights": "negtive=2"}, "negative"),
        ({"class_weights": "negative=-1"}, "above 0"),
        ({"class_weights": "balanced", "labels": "negative,positive,none"}, "no example of none"),
        ({"class_weights": "balanced", "problem": "regression", "labels": None}, "no meaning for a regression"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    rows = [{**row, "label": 1.0} for row in words.reviews()] if "problem" in options else words.reviews()
    with pytest.raises(ConfigError, match=message):
        fitted(rows, **options)
    with pytest.raises(ConfigError, match="no meaning for task causal_lm"):
        tasks.get("causal_lm").fitted([], TaskOptions(labels="a,b"), words.config())


def test_class_weights_count_rare_labels_more(bert: Path) -> None:
    rows = [*words.reviews(), *[r for r in words.reviews() if r["label"] == "negative"]]
    plain, weighted = fitted(rows), fitted(rows, class_weights="balanced")
    assert weighted.labels.weights[1] == pytest.approx(2 * weighted.labels.weights[0])
    assert fitted(rows, class_weights="positive=3").labels.weights == pytest.approx((0.6, 1.8))
    processor = plain.processor(str(bert))
    model = plain.model(str(bert)).eval()
    batch = plain.collate(plain.encode(rows_of(rows), processor, max_length=64, train_on="all").examples, processor)
    each = torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")
    expected = sum(loss * weighted.labels.weights[label] for loss, label in zip(each, batch["labels"], strict=True))
    torch.testing.assert_close(weighted.loss(model, batch).total, expected)


def test_a_head_is_kept_for_its_own_labels_and_made_anew_for_others(bert: Path, tmp_path: Path) -> None:
    task = fitted(words.reviews())
    task.model(str(bert)).save_pretrained(tmp_path)
    words.tokenizer().save_pretrained(tmp_path)
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).classifier.weight
    assert torch.equal(task.model(str(tmp_path)).classifier.weight, head)
    other = fitted([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.warns(UserWarning, match="told negative, positive; for x, y it starts at random"):
        assert not torch.equal(other.model(str(tmp_path)).classifier.weight, head)
    with pytest.raises(ConfigError, match="--labels negative,positive"):
        fitted(words.reviews(), labels="positive,negative").model(str(tmp_path))


METHODS = [
    {"method": "full"},
    {"method": "head"},
    {"r": 4, "learning_rate": 0.01},
    {"use_dora": True, "learning_rate": 0.01},
    {"family": "adalora", "learning_rate": 0.01},
    {"family": "vera", "r": 8, "learning_rate": 0.02},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m)))
def test_every_method_learns_and_comes_back_with_its_labels(method: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "train.jsonl", words.reviews())
    result = train(
        RunConfig(
            model=str(bert),
            data=str(data),
            output=str(tmp_path / "run"),
            task="seq_cls",
            eval_data=str(data),
            max_steps=40,
            eval_every=40,
            **{"learning_rate": 0.01, **method},
        )
    )
    before, after = result.record.held_out_before, result.record.held_out_after
    assert before is not None
    assert after is not None
    assert after["loss"] < before["loss"]
    assert json.loads((tmp_path / "run" / "best" / "task.json").read_text())["labels"] == ["negative", "positive"]
    adapted = method.get("method") is None
    given = ["--adapter", str(tmp_path / "run")] if adapted else ["--model", str(tmp_path / "run" / "last")]
    rows = [{"text": row["text"]} for row in words.reviews(6)]
    out = tmp_path / "said.jsonl"
    assert main(["predict", *given, "--data", str(written(tmp_path / "new.jsonl", rows)), "--output", str(out)]) == 0
    said = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one["origin"] for one in said] == [f"new.jsonl:{at}" for at in range(1, 7)]
    assert {one["label"] for one in said} <= {"negative", "positive"}
    if adapted:
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run" / "best")
        assert loaded.config.id2label == {0: "negative", 1: "positive"}


@pytest.mark.parametrize("method", [{"method": "full"}, {"target_modules": ["query"]}])
def test_the_head_learns_at_its_own_rate(method: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    def weights(name: str, **settings: Any) -> dict[str, torch.Tensor]:
        given = {"model": str(bert), "task": "seq_cls", "output": str(tmp_path / name), "learning_rate": 0.1}
        rest = {"optimizer": "sgd", "warmup": 0, "schedule": "constant", "max_steps": 1, "clip": None}
        train(RunConfig(**given, **rest, **settings, **method), train_rows=words.reviews())
        (file,) = (tmp_path / name / "last").glob("*.safetensors")
        return load_file(file)

    same, one, two, three = (
        weights("same"),
        *(weights(f"at-{rate}", head_learning_rate=rate) for rate in (0.1, 0.2, 0.3)),
    )
    heads = {name for name in same if "classifier" in name}
    assert len(heads) == 2
    for name in same:
        assert torch.equal(same[name], one[name])
        if name in heads:
            # By plain gradient descent a step is as long as the rate.
            assert not torch.equal(one[name], two[name])
            torch.testing.assert_close(three[name] - one[name], 2 * (two[name] - one[name]))
        else:
            assert torch.equal(one[name], two[name])


def test_a_rate_for_a_head_needs_one(tmp_path: Path) -> None:
    chat.saved(tmp_path / "model")
    config = RunConfig(model=str(tmp_path / "model"), output=str(tmp_path / "run"), head_learning_rate=0.1)
    with pytest.raises(ConfigError, match="no meaning on a LlamaForCausalLM: no head beside its body learns"):
        train(config, train_rows=chat.pairs(4))


def test_merged_it_predicts_the_same(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "train.jsonl", words.reviews())
    flags = ["--task", "seq_cls", "--max-steps", "3", "--learning-rate", "0.01"]
    assert main(["train", "--model", str(bert), "--data", str(data), "--output", str(tmp_path / "run"), *flags]) == 0
    assert (tmp_path / "run" / "confusion.png").stat().st_size > 1000
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(bert), "--adapter", str(tmp_path / "run"), "--output", str(merged)]) == 0
    outputs = []
    for given in (["--adapter", str(tmp_path / "run")], ["--model", str(merged)]):
        capsys.readouterr()
        assert main(["predict", *given, "--data", str(data), "--json"]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["predictions"])
        picture = tmp_path / f"{len(outputs)}.png"
        assert main(["eval", *given, "--data", str(data), "--plot", str(picture)]) == 0
        assert picture.stat().st_size > 1000
    for one, other in zip(*outputs, strict=True):
        assert one["label"] == other["label"]
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-4)
    assert transformers.AutoModelForSequenceClassification.from_pretrained(merged).config.id2label[1] == "positive"


def test_the_wrong_task_is_refused(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "train.jsonl", words.reviews())
    assert main(["predict", "--model", str(bert), "--data", str(data), "--task", "seq_cls"]) == 2
    assert "Nothing says which labels" in capsys.readouterr().err
    config = RunConfig(model=str(bert), data=str(data), output=str(tmp_path / "run"), task="seq_cls", max_steps=1)
    train(config)
    assert main(["eval", "--adapter", str(tmp_path / "run"), "--data", str(data), "--task", "token_cls"]) == 2
    assert "was trained for task seq_cls, not token_cls" in capsys.readouterr().err


def test_pairs_of_texts_and_long_ones(bert: Path) -> None:
    rows = rows_of([{"text": "the film was good", "text_pair": "it was fine", "label": at} for at in (0, 1)])
    task = tasks.get("seq_cls").fitted(rows, TaskOptions(), words.config())
    tokenizer = task.processor(str(bert))
    (first, _) = task.encode(rows, tokenizer, max_length=64, train_on="all").examples
    assert first.input_ids == tokenizer("the film was good", "it was fine")["input_ids"]
    assert first.more["token_type_ids"] == tokenizer("the film was good", "it was fine")["token_type_ids"]
    cut = task.encode(rows, tokenizer, max_length=7, train_on="all")
    assert cut.report.truncated == 2
    assert cut.lengths == [7, 7]
    with pytest.raises(DataError, match="example 1 has 10 tokens"):
        task.encode(rows, tokenizer, max_length=7, train_on="all", truncate="fail")
    assert task.encode(rows, tokenizer, max_length=7, train_on="all", truncate="drop").report.dropped == 2


def test_a_confusion_matrix_is_a_png(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.png"):
        confusion_plot({"labels": ["a", "b"], "counts": [[1, 0], [0, 1]]}, tmp_path / "matrix.svg")
