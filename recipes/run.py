"""Run recipes: train, measure on what was held out, predict, merge, and compare with what each expects.

    python recipes/run.py [NAME[:METHOD] ...] [--compare] [--work FOLDER] [--steps N]

FOLDER has ``models`` and ``data`` (see models.py and originals.py); runs go to ``runs`` in it, figures to
``results.csv``. With ``--compare``, or as sst2:full, a recipe is also run by the other methods that it names: the same
seed, data and steps. With ``--steps`` each recipe is only tried for so many steps, and nothing is expected.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from veneer.report.tables import side_by_side, table
from veneer.train.families import adapter_fields

HERE = Path(__file__).resolve().parent
_EXPECT = re.compile(r"^# expect: (\w+) ([\d.]+) within (\d+) minutes", re.MULTILINE)
_SETTING = re.compile(r"^# (eval|answers|rest): (\S+)", re.MULTILINE)
_QUESTION = re.compile(r"^# ask: (.+)$", re.MULTILINE)
_METHOD = re.compile(r"^# (full|head): (.+)$", re.MULTILINE)
LOWER = {"loss", "perplexity", "wer", "cer", "mean_absolute_error"}
"""Metrics that are better when small."""
BESIDE = ("f1_macro", "mcc", "exact_match", "recall_at_1", "rougeL")
"""Metrics that a study shows beside the recipe's own."""
ROWS = 8
"""Rows of which a merged model has to say what the adapted one says."""
COLUMNS = ("recipe", "method", "metric", "value", "minutes", "trainable", "gigabytes", "command")
"""Of results.csv."""


class FailedError(Exception):
    """A command that did not end well."""


@dataclass(frozen=True)
class Recipe:
    """A run config with what it is measured on and what it should reach."""

    name: str
    path: Path
    settings: dict[str, str]
    metric: str
    expected: float
    minutes: int
    question: str | None
    """What the model is asked before and after."""
    methods: dict[str, dict[str, Any]]
    """Other methods to compare it with, each with the fields of the config that differ."""

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """A recipe's comments."""
        text = path.read_text(encoding="utf-8")
        expect = _EXPECT.search(text)
        assert expect is not None, f"{path} says nothing of what it expects"
        asked = _QUESTION.search(text)
        methods = {
            method: {name: yaml.safe_load(value) for name, value in (one.split("=", 1) for one in given.split())}
            for method, given in _METHOD.findall(text)
        }
        return cls(
            name=path.stem,
            path=path,
            settings=dict(_SETTING.findall(text)),
            metric=expect[1],
            expected=float(expect[2]),
            minutes=int(expect[3]),
            question=asked[1] if asked else None,
            methods=methods,
        )

    def config(self, method: str | None = None) -> dict[str, Any]:
        """The fields of its run, by another method when one is named: without an adapter's, in a folder of its own."""
        fields: dict[str, Any] = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        if method is None:
            return fields
        kept = {name: value for name, value in fields.items() if name not in adapter_fields()}
        return {**kept, "method": method, **self.methods[method], "output": f"{fields['output']}-{method}"}

    def reached(self, value: float) -> bool:
        """Whether a value is as good as expected."""
        return self.ahead(value, self.expected) >= 0

    def ahead(self, value: float, other: float) -> float:
        """By how much a value is better than another."""
        return other - value if self.metric in LOWER else value - other


@dataclass(frozen=True)
class Result:
    """What came of a recipe."""

    recipe: Recipe
    method: str | None
    """The other method that it was run by; None for the recipe as it stands."""
    seconds: float
    """From the start of the training's process to its end."""
    metrics: dict[str, float]
    trained: dict[str, Any]
    """The run's record."""
    answers: dict[str, str] = field(default_factory=dict)
    """The answers to the recipe's question, by who gave them."""

    @property
    def name(self) -> str:
        """As ``run.py`` takes it."""
        return self.recipe.name if self.method is None else f"{self.recipe.name}:{self.method}"

    @property
    def value(self) -> float:
        """Of the recipe's metric."""
        return self.metrics[self.recipe.metric]

    @property
    def keeps_the_rest(self) -> bool:
        """Whether its metric, a share of 1, is at most 1 point worse than before on the rest, where there is one."""
        if "rest" not in self.recipe.settings:
            return True
        name = f"{self.recipe.metric}_rest"
        return self.recipe.ahead(self.metrics[name], self.metrics[f"{name}_before"]) >= -0.01


def recipes() -> dict[str, Recipe]:
    """Every recipe by its name."""
    return {path.stem: Recipe.read(path) for path in sorted(HERE.glob("*.yaml"))}


def veneer(arguments: Sequence[str]) -> str:
    """Run a command; what it wrote, when that is JSON.

    It has a process of its own, since the most memory that a run held is the most that its process ever held.

    Raises:
        FailedError: it ended with another exit code than 0.
    """
    stdout = subprocess.PIPE if "--json" in arguments else None
    done = subprocess.run([sys.executable, "-m", "veneer", *arguments], stdout=stdout, text=True, check=False)
    if done.returncode:
        raise FailedError(f"veneer {arguments[0]} failed with exit code {done.returncode}.")
    return done.stdout or ""


def run(recipe: Recipe, steps: int | None = None, method: str | None = None) -> Result:
    """Train and measure, in the folder that the program is in."""
    config = recipe.config(method)
    before = Path(config["model"]).parts
    if before[0] == "runs" and not Path(config["model"]).exists():
        # It goes on from what another recipe has trained.
        run(recipes()[before[1]], steps)
    output = Path(config["output"])
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    path = recipe.path
    if method is not None:
        path = output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    flags = ["--max-steps", str(steps), "--eval-every", str(steps)] if steps else []
    began = time.perf_counter()
    veneer(["train", "--config", str(path), *flags])
    seconds = time.perf_counter() - began
    trained = json.loads((output / "result.json").read_text(encoding="utf-8"))
    kept = trained["best"] or trained["last"]
    given = ["--model", config["model"], "--adapter", kept] if trained["method"] == "lora" else ["--model", kept]
    answers = ["--answers", "2" if steps else recipe.settings["answers"]] if "answers" in recipe.settings else []
    metrics = measured(given, recipe.settings["eval"], answers)
    if "rest" in recipe.settings:
        # What it was good at before is to stay: its figures on both, before and after.
        untrained = ["--model", config["model"], "--task", config["task"]]
        metric = recipe.metric
        metrics |= {
            f"{metric}_before": measured(untrained, recipe.settings["eval"], answers)[metric],
            f"{metric}_rest": measured(given, recipe.settings["rest"], answers)[metric],
            f"{metric}_rest_before": measured(untrained, recipe.settings["rest"], answers)[metric],
        }
    if trained["method"] == "lora":
        merged_alike(config["model"], kept, recipe, output)
    said = {}
    if recipe.question is not None:
        most = 8 if steps else 128
        said = {
            "untrained": ask(["--model", config["model"]], recipe.question, most),
            trained["method"]: ask(given, recipe.question, most),
        }
    return Result(recipe, method, seconds, metrics, trained, said)


def measured(given: Sequence[str], data: str, answers: Sequence[str]) -> dict[str, float]:
    """A model's figures on some data."""
    found = json.loads(veneer(["eval", *given, "--data", data, *answers, "--json"]))
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def merged_alike(model: str, adapter: str, recipe: Recipe, output: Path) -> None:
    """Merge the adapter into its model, and let both say the same of the first rows that it is measured on.

    Raises:
        FailedError: they do not.
    """
    rows, merged = Path(recipe.settings["eval"]), output / "merged"
    if rows.is_file():
        first = output / "rows.jsonl"
        first.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]), encoding="utf-8")
        rows = first
    veneer(["merge", "--model", model, "--adapter", adapter, "--output", str(merged), "--dtype", "float32"])
    said = []
    for name, given in ("adapted", ["--model", model, "--adapter", adapter]), ("merged", ["--model", str(merged)]):
        path = output / f"said-{name}.jsonl"
        veneer(["predict", *given, "--data", str(rows), "--output", str(path), "--max-new-tokens", "32"])
        said.append([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    shutil.rmtree(merged)
    if not said[0] or not alike(*said):
        raise FailedError(f"the merged model does not say what the adapted one does; see {output}/said-*.jsonl.")


def alike(one: Any, other: Any) -> bool:
    """Whether two predictions are the same, their numbers but for rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3)
    return bool(one == other)


def ask(given: Sequence[str], question: str, most: int) -> str:
    """A model's likeliest answer."""
    flags = ["--prompt", question, "--max-new-tokens", str(most), "--json"]
    (answer,) = json.loads(veneer(["generate", *given, *flags]))["answers"]
    return str(answer["text"])


def screen() -> Console:
    """Where tables go: as wide as the terminal, and in a file as wide as they need."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show(results: Sequence[Result]) -> None:
    """What was reached, beside what was expected."""
    numbers = ("value", "expected", "trainable", "minutes", "within", "GB")
    made = table("recipe", "metric", *numbers, title="Recipes", numbers=numbers)
    for result in results:
        recipe, value = result.recipe, f"{result.value:.4g}"
        own = result.method is None
        made.add_row(
            result.name,
            recipe.metric,
            f"[{'green' if recipe.reached(result.value) else 'red'}]{value}[/]" if own else value,
            f"{recipe.expected:g}" if own else "",
            f"{result.trained['trainable']:,}",
            f"{result.seconds / 60:.1f}",
            str(recipe.minutes) if own else "",
            f"{result.trained['peak_memory'] / 1e9:.2f}",
        )
    console = screen()
    console.print(made)
    for result in results:
        if "rest" in result.recipe.settings:
            console.print(kept(result), highlight=False)
        if result.answers:
            console.print(side_by_side(result.answers, prompt=result.recipe.question))


def kept(result: Result) -> str:
    """What became of what a model was trained on, and of the rest, in a sentence.

    >>> kept(result)
    'whisper: wer 0.432 -> 0.121 on data/accent/test; 0.0752 -> 0.0781 on data/prompts/test (within 1 point).'
    """
    recipe, metrics = result.recipe, result.metrics
    eval_, rest = (
        f"{metrics[f'{name}_before']:.3g} -> {metrics[name]:.3g} on {recipe.settings[kind]}"
        for kind, name in (("eval", recipe.metric), ("rest", f"{recipe.metric}_rest"))
    )
    within = "within" if result.keeps_the_rest else "worse by more than"
    return f"{result.name}: {recipe.metric} {eval_}; {rest} ({within} 1 point)."


def study(results: Sequence[Result]) -> None:
    """One recipe by several methods."""
    recipe = results[0].recipe
    more = [name for name in BESIDE if name != recipe.metric and all(name in one.metrics for one in results)]
    numbers = (recipe.metric, *more, "held-out loss", "trainable", "minutes", "GB")
    made = table("method", *numbers, title=f"{recipe.name}: the same seed, data and steps", numbers=numbers)
    for result in results:
        loss = result.metrics.get("loss")
        made.add_row(
            result.trained["method"],
            f"{result.value:.4g}",
            *(f"{result.metrics[name]:.4g}" for name in more),
            "" if loss is None else f"{loss:.4f}",
            f"{result.trained['trainable']:,}",
            f"{result.seconds / 60:.1f}",
            f"{result.trained['peak_memory'] / 1e9:.2f}",
        )
    console = screen()
    console.print(made)
    console.print(verdict(results), highlight=False)


def verdict(results: Sequence[Result]) -> str:
    """How the first of a recipe's results stands to those of other methods, in a sentence.

    >>> verdict([lora, full, head])
    'lora: 0.2 points below full (within 1 point), 18.9 points above the head alone.'
    """
    own, *others = results
    recipe = own.recipe
    # A metric that is a share counts to 1 or to 100, as its library has it; what is better when small is no share.
    points = 1 if recipe.metric in LOWER or recipe.expected > 1 else 100
    unit = "" if recipe.metric in LOWER else " points"
    parts = []
    for other in others:
        ahead = recipe.ahead(own.value, other.value) * points
        side = "above" if ahead >= 0 else "below"
        if recipe.metric in LOWER:
            side = "better than" if ahead >= 0 else "worse than"
        part = f"{abs(ahead):.3g}{unit} {side} {'full' if other.method == 'full' else 'the head alone'}"
        if other.method == "full" and unit:
            part += " (within 1 point)" if ahead >= -1 else " (more than 1 point)"
        parts.append(part)
    return f"{own.trained['method']}: {', '.join(parts)}."


def record(result: Result, path: Path) -> None:
    """Add the figures to a table, one line a metric."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if fresh:
            writer.writerow(COLUMNS)
        trained = result.trained
        for metric, value in result.metrics.items():
            minutes, size = f"{result.seconds / 60:.2f}", f"{trained['peak_memory'] / 1e9:.3f}"
            figures = (f"{value:.6g}", minutes, trained["trainable"], size)
            command = f"python recipes/run.py {result.name}"
            writer.writerow((result.recipe.name, trained["method"], metric, *figures, command))


def chosen(names: Sequence[str], *, compare: bool) -> list[tuple[Recipe, list[str | None]]]:
    """The recipes to run, each with the methods to run it by.

    Raises:
        ValueError: there is no such recipe, or it says nothing of a method.
    """
    known = recipes()
    found: list[tuple[Recipe, list[str | None]]] = []
    for given in names or known:
        name, _, method = given.partition(":")
        if name not in known:
            raise ValueError(f"there is no recipe {name!r}; expected any of {', '.join(known)}")
        recipe = known[name]
        if method and method not in recipe.methods:
            says = f"only of {', '.join(recipe.methods)}" if recipe.methods else "of no other method"
            raise ValueError(f"{name} says nothing of {method!r}, {says}; add '# {method}: learning_rate=...' to it")
        found.append((recipe, [method] if method else [None, *(recipe.methods if compare else ())]))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME[:METHOD]", help=f"of {', '.join(recipes())}; all by default")
    parser.add_argument("--compare", action="store_true", help="also by the other methods that a recipe names")
    parser.add_argument("--work", type=Path, default=Path("."))
    parser.add_argument("--steps", type=int)
    options = parser.parse_args(arguments)
    try:
        wanted = chosen(options.names, compare=options.compare)
    except ValueError as error:
        parser.error(str(error))
    os.chdir(options.work)
    results: list[Result] = []
    failed: list[str] = []
    for recipe, methods in wanted:
        own = []
        try:
            for method in methods:
                own.append(run(recipe, options.steps, method))
                if not options.steps:
                    record(own[-1], Path("results.csv"))
        except FailedError as error:
            # The others take hours that would be lost.
            failed.append(f"{recipe.name}: {error}")
        if len(own) > 1:
            study(own)
        results += own
    show(results)
    as_they_stand = [one for one in results if one.method is None]
    missed = [one.name for one in as_they_stand if not (one.recipe.reached(one.value) and one.keeps_the_rest)]
    if missed and not options.steps:
        failed.append(f"Below what was expected: {', '.join(missed)}.")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
