from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jiwer
import pytest
import sacrebleu
import torch
import transformers
from rouge_score import rouge_scorer

from tests import chat, words
from veneer.cli.main import main
from veneer.core.errors import ConfigError, DataError
from veneer.data.sources import rows_of
from veneer.tasks import judges
from veneer.tasks import task as tasks
from veneer.tasks.options import TaskOptions
from veneer.tasks.sampling import Sampling
from veneer.tasks.writing import write


def t5() -> Any:
    """A random encoder-decoder, 32 wide, for the words' tokenizer."""
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=3,
            dropout_rate=0.0,
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("t5")
    t5().save_pretrained(made)
    words.tokenizer().save_pretrained(made)
    return made


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Texts with a word that is to be copied."""
    told = ("good", "bad", "fine", "poor")
    return [
        {"source": f"the film was {'very ' * (at % 3)}{told[at % 4]}", "target": f"{told[at % 4]} {'film ' * (at % 2)}"}
        for at in range(count)
    ]


def fitted(name: str, given: list[dict[str, Any]], config: Any, **options: Any) -> Any:
    return tasks.get(name).fitted(rows_of(given), TaskOptions(**options), config)


@pytest.mark.parametrize("prefix", [None, "went to "])
def test_loss_and_metrics_are_those_of_transformers(prefix: str | None, folder: Path) -> None:
    model, tokenizer = t5().eval(), words.tokenizer()
    task = fitted("seq2seq_lm", rows(), model.config, prefix=prefix)
    examples = task.encode(rows_of(rows()), tokenizer, max_length=64, train_on="all").examples
    losses, tokens = 0.0, 0
    for row, example in zip(rows(), examples, strict=True):
        source = tokenizer(f"{prefix or ''}{row['source']}", return_tensors="pt")["input_ids"]
        target = tokenizer(row["target"], return_tensors="pt")["input_ids"]
        assert example.input_ids == source[0].tolist()
        losses += model(input_ids=source, labels=target).loss.item() * target.numel()
        tokens += target.numel()
    for batch_size in (1, 5):
        found = tasks.measure(task, model, examples, tokenizer, batch_size=batch_size, device="cpu")
        assert found.metrics["loss"] == pytest.approx(losses / tokens, rel=1e-5)
        assert found.tally.units == tokens


def test_a_decoder_without_a_shift_of_its_own_gets_the_same() -> None:
    from veneer.tasks.decoding import decoder_inputs

    model = t5()
    labels = torch.tensor([[5, 6, 3], [7, 3, -100]])
    own = model.prepare_decoder_input_ids_from_labels(labels=labels)

    class Bare(torch.nn.Module):
        config = model.config

    assert torch.equal(decoder_inputs(Bare(), labels), own)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_those_of_transformers(batch_size: int, folder: Path) -> None:
    model, tokenizer = t5().eval(), words.tokenizer()
    task = fitted("seq2seq_lm", rows(), model.config)
    asked = task.ask(rows_of([{"source": row["source"]} for row in rows(6)]), tokenizer, max_length=64)
    found = write(task, model, asked, tokenizer, Sampling(max_new_tokens=6), batch_size=batch_size)
    for one, row in zip(found, rows(6), strict=True):
        given = tokenizer(row["source"], return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            out = model.generate(**given, max_new_tokens=6, do_sample=False)
        assert one.text == tokenizer.decode(out[0], skip_special_tokens=True)


def test_metrics_of_answers_are_those_of_the_libraries() -> None:
    answers = ["the cat sat on a mat", "hello there", "no"]
    right = ["the cat sat on the mat", "hello you there", "yes"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    alone = [[text] for text in right]
    for kind in ("rouge1", "rouge2", "rougeL"):
        mean = sum(scorer.score(r, a)[kind].fmeasure for a, r in zip(answers, right, strict=True)) / 3
        assert judges.judged([kind], answers, alone)[kind] == pytest.approx(mean)
    assert judges.judged(["bleu"], answers, alone)["bleu"] == sacrebleu.corpus_bleu(answers, [right]).score
    assert judges.judged(["chrf"], answers, alone)["chrf"] == sacrebleu.corpus_chrf(answers, [right]).score
    # Three words of ten are other ones or missing: the, you, yes.
    assert judges.judged(["wer"], answers, alone)["wer"] == pytest.approx(3 / 10)
    assert judges.judged(["wer"], ["Hello, THERE!"], [["hello there"]])["wer"] == 0
    assert judges.judged(["cer"], ["abd"], [["abc"]])["cer"] == pytest.approx(1 / 3)
    assert judges.judged(["exact_match"], ["a ", "b"], [["a"], ["c"]])["exact_match"] == 0.5
    worked = ["so 3 + 4 = 7", "it is 1,200.50", "none", "5"]
    assert judges.judged(["final_number"], worked, [["#### 7"], ["1200.5"], ["3"], ["6"]])["final_number"] == 0.5
    with pytest.raises(ConfigError, match=r"judge_by has .bluw.*bleu"):
        judges.named("bluw", ())


def test_of_several_references_the_nearest_counts() -> None:
    answers = ["the cat sat on a mat", "no dog 7"]
    right = [["a bird", "the cat sat on the mat", "cats sit"], ["no dog at all: 9", "so: 7"]]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    nearest = [max(scorer.score(r, a)["rougeL"].fmeasure for r in rs) for a, rs in zip(answers, right, strict=True)]
    assert judges.judged(["rougeL"], answers, right)["rougeL"] == pytest.approx(sum(nearest) / 2)
    # sacrebleu takes the references the other way round, and an empty one where there is none.
    turned = [["a bird", "no dog at all: 9"], ["the cat sat on the mat", "so: 7"], ["cats sit", ""]]
    assert judges.judged(["bleu"], answers, right)["bleu"] == sacrebleu.corpus_bleu(answers, turned).score
    assert judges.judged(["chrf"], answers, right)["chrf"] == sacrebleu.corpus_chrf(answers, turned).score
    # Of five words three are other ones or missing, where "so: 7" has two and both are.
    found = judges.judged(["wer", "cer", "exact_match", "final_number"], answers, right)
    assert found["wer"] == pytest.approx(jiwer.wer(["the cat sat on the mat", "no dog at all 9"], answers))
    assert (found["exact_match"], found["final_number"]) == (0, 0.5)
    assert judges.judged(["exact_match"], ["b "], [["a", "b"]])["exact_match"] == 1
    assert judges.judged(["wer"], ["b"], [["!", "a b"]])["wer"] == 0.5


TRANSLATIONS = [{"translation": {"en": row["source"], "de": row["target"]}} for row in rows()]


def test_translations_come_in_three_forms(folder: Path) -> None:
    config, tokenizer = t5().config, words.tokenizer()
    forms = [TRANSLATIONS, rows(), [{"prompt": r["source"], "completion": r["target"]} for r in rows()]]
    found = []
    for form in forms:
        task = fitted("translation", form, config)
        found.append(task.encode(rows_of(form), tokenizer, max_length=64, train_on="completion").examples)
    assert found[0] == found[1] == found[2]
    back = fitted("translation", TRANSLATIONS, config, languages="de-en")
    (first, *_) = back.encode(rows_of(TRANSLATIONS), tokenizer, max_length=64, train_on="completion").examples
    assert (first.input_ids, first.labels) == (found[0][0].labels, found[0][0].input_ids)
    assert set(back.answer_goals) == {"bleu", "chrf"}
    assert tasks.get("translation").restored(back.to_dict()) == back


def test_a_language_model_is_told_what_to_translate_into() -> None:
    config, tokenizer = chat.model().config, chat.tokenizer()
    with pytest.raises(ConfigError, match="--languages en-de"):
        fitted("translation", TRANSLATIONS, config)
    with pytest.raises(ConfigError, match="expected from which to which"):
        fitted("translation", TRANSLATIONS, config, languages="german")
    task = fitted("translation", TRANSLATIONS, config, languages="en-de")
    assert task.packs
    (asked, *_) = task.ask(rows_of(TRANSLATIONS), tokenizer, max_length=120)
    assert asked.more["asked"] == "Translate from en to de:\n\nthe film was good"
    assert asked.more["reference"] == "good "
    with pytest.raises(DataError, match="example 1 has the languages fr"):
        task.check(rows_of([{"translation": {"fr": "a", "en": "b"}}])[0])
    task.check(rows_of([{"translation": {"en": "b"}}])[0], labelled=False)


def test_languages_are_told_to_a_tokenizer_that_marks_them() -> None:
    class Marking:
        src_lang = tgt_lang = None

        def convert_tokens_to_ids(self, token: str) -> int:
            return {"de": 7}[token]

    task, marking = fitted("translation", TRANSLATIONS, t5().config, languages="en-de"), Marking()
    task.prepare(rows_of(TRANSLATIONS), marking)
    assert (marking.src_lang, marking.tgt_lang) == ("en", "de")
    assert task.generation(marking) == {"forced_bos_token_id": 7}


@pytest.mark.parametrize("truncate", ["end", "start", "drop", "fail"])
def test_what_is_too_long_is_cut_dropped_or_named(truncate: Any) -> None:
    given, tokenizer = rows(3), words.tokenizer()
    task = fitted("seq2seq_lm", given, t5().config)
    how = {"max_length": 7, "train_on": "all", "truncate": truncate}
    if truncate == "fail":
        with pytest.raises(DataError, match="example 3 has 8 tokens and 3 to write"):
            task.encode(rows_of(given), tokenizer, **how)
        return
    found = task.encode(rows_of(given), tokenizer, **how)
    assert max(found.lengths) <= 7
    assert (found.report.truncated, found.report.dropped) == ((0, 1) if truncate == "drop" else (1, 0))
    if truncate == "end":
        assert found.examples[2].input_ids[-1] == tokenizer.sep_token_id


@pytest.mark.parametrize("name", ["seq2seq_lm", "translation"])
def test_trained_saved_and_merged_it_writes_the_same(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = chat.written(tmp_path / "train.jsonl", rows() if name == "seq2seq_lm" else TRANSLATIONS)
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    flags = ["--task", name, "--max-steps", "20", "--eval-every", "20", "--learning-rate", "0.02"]
    flags += ["--eval-data", str(data), "--samples", "2", "--sample-tokens", "5"]
    assert main(["train", "--model", str(folder), "--data", str(data), "--output", run, *flags]) == 0
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["held_out_after"]["loss"] < record["held_out_before"]["loss"]
    assert ("bleu" if name == "translation" else "rougeL") in record["held_out_after"]
    assert main(["merge", "--model", str(folder), "--adapter", run, "--output", merged]) == 0
    found = []
    for given in (["--adapter", run], ["--model", merged]):
        capsys.readouterr()
        assert main(["predict", *given, "--data", str(data), "--max-new-tokens", "6", "--json"]) == 0
        found.append([one["text"] for one in json.loads(capsys.readouterr().out)["predictions"]])
        assert main(["eval", *given, "--data", str(data), "--answers", "3", "--json"]) == 0
        assert "chrf" in json.loads(capsys.readouterr().out) or name == "seq2seq_lm"
    assert found[0] == found[1]


def test_a_language_model_that_translates_is_merged_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, llama = chat.written(tmp_path / "train.jsonl", TRANSLATIONS), chat.saved(tmp_path / "llama")
    run, merged = str(tmp_path / "run"), str(tmp_path / "merged")
    asked = ["train", "--model", str(llama), "--data", str(data), "--output", run, "--task", "translation"]
    assert main([*asked, "--languages", "en-de", "--max-steps", "2", "--learning-rate", "0.02"]) == 0
    assert main(["merge", "--model", str(llama), "--adapter", run, "--output", merged]) == 0
    found = []
    for given in (["--adapter", run], ["--model", merged]):
        capsys.readouterr()
        assert main(["predict", *given, "--data", str(data), "--max-new-tokens", "6", "--json"]) == 0
        found.append([one["text"] for one in json.loads(capsys.readouterr().out)["predictions"]])
    assert found[0] == found[1]
