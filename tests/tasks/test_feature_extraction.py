from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy import stats
from torch.nn import functional as F

from tests import words
from veneer import AutoPeftModelForFeatureExtraction
from veneer.cli.main import main
from veneer.core.errors import ConfigError, DataError
from veneer.data.sources import rows_of
from veneer.tasks import task as tasks
from veneer.tasks.embeddings import pooled, ranking, way_of
from veneer.tasks.options import TaskOptions
from veneer.train.config import RunConfig
from veneer.train.loop import train

ADJECTIVES, NOUNS = ("good", "bad", "fine", "poor", "very good", "not bad"), ("film", "paris", "film was")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words.saved(tmp_path_factory.mktemp("bert"))


def pairs(count: int = 18) -> list[dict[str, Any]]:
    """What belongs together shares its words."""
    every = [
        {"anchor": f"the {n} {a}", "positive": f"i saw a {a} {n} and it was so {a}"} for a in ADJECTIVES for n in NOUNS
    ]
    return every[:count]


def triplets() -> list[dict[str, Any]]:
    """Only some have a negative of their own."""
    rows = pairs()
    return [
        {**row, **({"negative": f"not {other['positive']} i saw"} if at % 3 else {})}
        for at, (row, other) in enumerate(zip(rows, rows[1:] + rows[:1], strict=True))
    ]


def scored() -> list[dict[str, Any]]:
    rows = pairs()
    return [
        {"text": row["anchor"], "text_pair": rows[(at + at % 3) % len(rows)]["positive"], "score": 5 - 2 * (at % 3)}
        for at, row in enumerate(rows)
    ]


DATA = {"pairs": pairs, "triplets": triplets, "scored": scored}


def fitted(rows: list[dict[str, Any]], **options: Any) -> Any:
    return tasks.get("feature_extraction").fitted(rows_of(rows), TaskOptions(**options), words.config())


def by_hand(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """One text alone, without padding: the mean of all its tokens, of length 1."""
    states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return F.normalize(states.mean(0), dim=0)


def loss_by_hand(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The mean loss of all rows as one batch, written out."""
    vector = {text: by_hand(model, tokenizer, text) for row in rows for text in row.values() if isinstance(text, str)}
    if "score" in rows[0]:
        return torch.stack(
            [(vector[row["text"]] @ vector[row["text_pair"]] - (row["score"] - 1) / 4) ** 2 for row in rows]
        ).mean()
    candidates = [row[name] for name in ("positive", "negative") for row in rows if name in row]
    losses = []
    for row in rows:
        near = {text: 20 * vector[row["anchor"]] @ vector[text] for text in candidates}
        losses.append(torch.logsumexp(torch.stack(list(near.values())), 0) - near[row["positive"]])
    return torch.stack(losses).mean()


def examples_of(task: Any, processor: Any, rows: list[dict[str, Any]], **how: Any) -> Any:
    return task.encode(rows_of(rows), processor, **{"max_length": 64, "train_on": "completion", **how}).examples


@pytest.mark.parametrize("data", DATA)
def test_loss_and_gradient_are_those_written_by_hand(data: str, bert: Path) -> None:
    rows = DATA[data]()
    task = fitted(rows)
    processor, model = task.processor(str(bert)), task.model(str(bert)).eval()
    batch = task.collate(examples_of(task, processor, rows), processor)
    found = task.loss(model, batch)
    assert task.units(batch) == found.tally.units == len(rows)
    (found.total / len(rows)).backward()
    weight = model.encoder.layer[0].attention.self.query.weight
    gradient, weight.grad = weight.grad, None
    expected = loss_by_hand(model, processor, rows)
    torch.testing.assert_close(found.total / len(rows), expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 18])
@pytest.mark.parametrize("data", DATA)
def test_what_is_measured_does_not_depend_on_batches(data: str, batch_size: int, bert: Path) -> None:
    rows = DATA[data]()
    task = fitted(rows)
    processor, model = task.processor(str(bert)), task.model(str(bert)).eval()
    examples = examples_of(task, processor, rows)
    found = tasks.measure(task, model, examples, processor, batch_size=batch_size, device="cpu").metrics
    assert set(found) == set(task.goals)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(loss_by_hand(model, processor, rows)), rel=1e-5)
        if data == "scored":
            cosines = [
                float(by_hand(model, processor, r["text"]) @ by_hand(model, processor, r["text_pair"])) for r in rows
            ]
            scores = [row["score"] for row in rows]
            assert found["spearman"] == pytest.approx(stats.spearmanr(cosines, scores).statistic, abs=1e-5)
            assert found["pearson"] == pytest.approx(stats.pearsonr(cosines, scores).statistic, abs=1e-5)
            return
        others = [row[name] for name in ("positive", "negative") for row in rows if name in row]
        vectors = torch.stack([by_hand(model, processor, text) for text in others])
        ranks = []
        for at, row in enumerate(rows):
            near = vectors @ by_hand(model, processor, row["anchor"])
            ranks.append(1 + int((near > near[at] + 1e-6).sum()))
    assert found["recall_at_1"] == pytest.approx(sum(rank == 1 for rank in ranks) / len(ranks))
    assert found["recall_at_10"] == pytest.approx(sum(rank <= 10 for rank in ranks) / len(ranks))
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))


def test_each_way_of_pooling_passes_padding_over() -> None:
    states = torch.arange(1.0, 17.0).reshape(2, 4, 2)
    for mask in (torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])):
        kept = [row[keep.bool()] for row, keep in zip(states, mask, strict=True)]
        for way, of in {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1]}.items():
            expected = torch.stack([F.normalize(of(row), dim=0) for row in kept])
            torch.testing.assert_close(pooled(states, mask, way), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "word_embedding_dimension": 32}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        (None, "mean"),
    ],
)
def test_pooling_is_that_of_the_models_folder(values: dict[str, Any] | None, expected: str, tmp_path: Path) -> None:
    words.config().save_pretrained(tmp_path)
    if values is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(values))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    task = tasks.get("feature_extraction")
    assert task.described(config).way == expected
    for pooling in ("mean", "cls", "last"):
        assert task.fitted(rows_of(pairs()), TaskOptions(pooling=pooling), config).way == pooling


def test_a_pooling_that_is_not_known_has_to_be_chosen(tmp_path: Path) -> None:
    words.config().save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ConfigError, match=r"pooling_mode_max_tokens.*give --pooling"):
        way_of(transformers.AutoConfig.from_pretrained(tmp_path))


def test_what_says_the_same_is_no_wrong_answer(bert: Path) -> None:
    """A positive that stands twice, and an anchor that is elsewhere a positive, are not pushed away."""
    rows = [
        {"anchor": "good", "positive": "fine"},
        {"anchor": "very good", "positive": "fine"},
        {"anchor": "fine", "positive": "good"},
    ]
    task = fitted(rows)
    processor, model = task.processor(str(bert)), task.model(str(bert)).eval()
    examples = examples_of(task, processor, rows)
    found = task.loss(model, task.collate(examples, processor))
    v = {text: by_hand(model, processor, text) for text in ("good", "fine", "very good")}
    # The first has nothing to compete with: one "fine" is itself, "good" is the anchor.
    expected = torch.logsumexp(20 * torch.stack([v["very good"] @ v["fine"], v["very good"] @ v["good"]]), 0)
    expected = expected - 20 * v["very good"] @ v["fine"]
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-5)
    measured = tasks.measure(task, model, examples, processor, batch_size=2, device="cpu").metrics
    assert measured["loss"] == pytest.approx(float(expected.detach()) / 3, rel=1e-5)


def test_a_model_that_gives_one_vector_for_everything_finds_nothing() -> None:
    same, said = torch.ones(12, 2) / 2**0.5, torch.arange(12)
    found = ranking(same, same, said + 100, said)
    assert found.ranks.tolist() == [12] * 12
    assert found.figures["recall_at_10"] == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"anchor": "a"}, "example 1 has no positive"),
        ({"anchor": "a", "positive": 3}, "positive = 3; expected text"),
        ({"anchor": "a", "positive": "b", "negative": "b"}, "same text as positive and as negative"),
        ({"text": "a", "text_pair": "b"}, "example 1 has no score"),
        ({"text": "a", "text_pair": "b", "score": "high"}, "expected a number"),
        ({"query": "a"}, "example 1 has the columns query; expected anchor"),
    ],
)
def test_a_row_that_is_wrong_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tasks.get("feature_extraction").check(rows_of([row])[0])


def test_kinds_of_rows_are_not_mixed(bert: Path) -> None:
    with pytest.raises(DataError, match="example 1 has no positive"):
        fitted(pairs()).check(rows_of([{"anchor": "a"}])[0])
    task = tasks.get("feature_extraction")
    processor, model = task.processor(str(bert)), task.model(str(bert))
    examples = examples_of(task, processor, [pairs()[0], scored()[0]])
    with pytest.raises(DataError, match="example 2 is of another kind than example 1"):
        tasks.measure(task, model, examples, processor, batch_size=1, device="cpu")


def test_scores_are_taken_as_they_are_or_scaled() -> None:
    def span(*scores: float) -> Any:
        return fitted([{"text": "a", "text_pair": "b", "score": score} for score in scores]).span

    assert span(0.2, 0.9) == span(-1, 1) == (0.0, 1.0)
    assert span(1, 3, 5) == (1, 5)
    task = fitted(scored())
    assert task.restored(json.loads(json.dumps(task.to_dict()))) == task


def test_cut_dropped_or_refused_as_a_whole(bert: Path) -> None:
    task = fitted(pairs())
    processor = task.processor(str(bert))
    rows, how = rows_of(pairs(2)), {"max_length": 6, "train_on": "completion"}
    cut = task.encode(rows, processor, **how)
    assert cut.report.truncated == 2
    assert all(max(example.more["lengths"]) == 6 for example in cut.examples)
    dropped = task.encode(rows, processor, **how, truncate="drop")
    assert (len(dropped.examples), dropped.report.dropped) == (0, 2)
    with pytest.raises(DataError, match="example 1 has 12 tokens"):
        task.encode(rows, processor, **how, truncate="fail")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("data", DATA)
def test_it_learns_and_comes_back(data: str, method: str, bert: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "train.jsonl", DATA[data]())
    config = RunConfig(
        model=str(bert),
        data=str(file),
        eval_data=str(file),
        output=str(tmp_path / "run"),
        task="feature_extraction",
        method=method,
        batch_size=6,
        max_steps=30,
        eval_every=30,
        learning_rate=0.01 if method == "lora" else 0.002,
    )
    record = train(config).record
    assert record.held_out_before is not None
    assert record.held_out_after is not None
    assert record.held_out_after["loss"] < record.held_out_before["loss"]
    given = ["--adapter", str(tmp_path / "run")] if method == "lora" else ["--model", str(tmp_path / "run" / "last")]
    column = "text" if data == "scored" else "anchor"
    new, out = written(tmp_path / "new.jsonl", [{column: "the film was good"}]), tmp_path / "said.jsonl"
    assert main(["predict", *given, "--data", str(new), "--output", str(out)]) == 0
    said = json.loads(out.read_text())
    assert sum(value**2 for value in said["embedding"]) == pytest.approx(1)
    if method == "lora":
        model = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "run" / "best").eval()
        expected = by_hand(model, words.tokenizer(), "the film was good")
        torch.testing.assert_close(torch.tensor(said["embedding"]), expected, rtol=1e-5, atol=1e-6)


def test_eval_and_predict_of_a_model_alone(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", str(bert), "--task", "feature_extraction", "--json"]
    for data, metric in (("triplets", "recall_at_10"), ("scored", "spearman")):
        file = written(tmp_path / f"{data}.jsonl", DATA[data]())
        assert main(["eval", *given, "--data", str(file)]) == 0
        assert metric in json.loads(capsys.readouterr().out)
    assert main(["predict", *given, "--data", str(tmp_path / "triplets.jsonl")]) == 0
    first, second = json.loads(capsys.readouterr().out)["predictions"][:2]
    assert list(first["others"]) == ["positive"]
    assert list(second["others"]) == list(second["cosines"]) == ["positive", "negative"]
    expected = sum(a * b for a, b in zip(second["embedding"], second["others"]["negative"], strict=True))
    assert second["cosines"]["negative"] == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_is_refused(bert: Path, tmp_path: Path) -> None:
    given = {"model": str(bert), "data": str(written(tmp_path / "a.jsonl", pairs())), "task": "feature_extraction"}
    with pytest.raises(ConfigError, match="batch_size is 1; task feature_extraction compares at least 2"):
        train(RunConfig(**given, output=str(tmp_path / "one"), batch_size=1))
    with pytest.raises(ConfigError, match="method=head has nothing to train"):
        train(RunConfig(**given, output=str(tmp_path / "two"), method="head"))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        tasks.get("feature_extraction").fitted(rows_of(pairs()), TaskOptions(), transformers.T5Config())
    with pytest.raises(ConfigError, match="pooling has no meaning for task seq_cls"):
        tasks.get("seq_cls").fitted(rows_of(words.reviews()), TaskOptions(pooling="cls"), words.config())


def test_a_preview_shows_what_belongs_together(bert: Path) -> None:
    task = fitted(triplets())
    processor = task.processor(str(bert))
    pieces = task.preview(examples_of(task, processor, triplets())[1], processor)
    assert [(piece.text.split(":")[0], piece.trained) for piece in pieces] == [
        ("anchor", False),
        ("positive", True),
        ("negative", False),
    ]
    (*_, last) = fitted(scored()).preview(examples_of(fitted(scored()), processor, scored())[0], processor)
    assert (last.text, last.trained) == ("score: 5", True)
