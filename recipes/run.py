"""Run recipes: train, measure on what was held out, and compare with what each expects.

    python recipes/run.py [NAME ...] [--work FOLDER] [--steps N]

FOLDER has ``models`` and ``data`` (see models.py and originals.py); runs go to ``runs`` in it, figures to
``results.csv``. With ``--steps`` each recipe is only tried for so many steps, and nothing is expected.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from veneer.cli.main import main as veneer
from veneer.report.tables import table

HERE = Path(__file__).resolve().parent
_EXPECT = re.compile(r"^# expect: (\w+) ([\d.]+) within (\d+) minutes", re.MULTILINE)
_SETTING = re.compile(r"^# (eval|answers): (\S+)", re.MULTILINE)
LOWER = {"loss", "perplexity", "wer", "cer", "mean_absolute_error"}
"""Metrics that are better when small."""


@dataclass(frozen=True)
class Recipe:
    """A run config with what it is measured on and what it should reach."""

    name: str
    path: Path
    settings: dict[str, str]
    metric: str
    expected: float
    minutes: int

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """A recipe's comments."""
        text = path.read_text(encoding="utf-8")
        expect = _EXPECT.search(text)
        assert expect is not None, f"{path} says nothing of what it expects"
        settings = dict(_SETTING.findall(text))
        return cls(path.stem, path, settings, expect[1], float(expect[2]), int(expect[3]))

    def reached(self, value: float) -> bool:
        """Whether a value is as good as expected."""
        return value <= self.expected if self.metric in LOWER else value >= self.expected


def recipes() -> dict[str, Recipe]:
    """Every recipe by its name."""
    return {path.stem: Recipe.read(path) for path in sorted(HERE.glob("*.yaml"))}


def run(recipe: Recipe, steps: int | None) -> dict[str, Any]:
    """Train and measure, in the folder that the program is in."""
    config = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    before = Path(config["model"]).parts
    if before[0] == "runs" and not Path(config["model"]).exists():
        # It goes on from what another recipe has trained.
        run(recipes()[before[1]], steps)
    output = Path(config["output"])
    shutil.rmtree(output, ignore_errors=True)
    began = time.perf_counter()
    flags = ["--max-steps", str(steps), "--eval-every", str(steps)] if steps else []
    _check(veneer(["train", "--config", str(recipe.path), *flags]), recipe)
    seconds = time.perf_counter() - began
    trained = json.loads((output / "result.json").read_text(encoding="utf-8"))
    kept = trained["best"] or trained["last"]
    given = ["--adapter", kept, "--model", config["model"]] if trained["method"] == "lora" else ["--model", kept]
    answers = ["--answers", "2" if steps else recipe.settings["answers"]] if "answers" in recipe.settings else []
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = veneer(["eval", *given, "--data", recipe.settings["eval"], *answers, "--json"])
    _check(code, recipe)
    found = json.loads(said.getvalue())
    metrics = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return {"recipe": recipe, "seconds": seconds, "metrics": metrics, "trained": trained}


def _check(code: int, recipe: Recipe) -> None:
    if code:
        raise SystemExit(f"{recipe.name} failed with exit code {code}.")


def show(results: list[dict[str, Any]]) -> None:
    """What was reached, beside what was expected."""
    numbers = ("value", "expected", "trainable", "minutes", "within", "GB")
    made = table("recipe", "metric", *numbers, title="Recipes", numbers=numbers)
    for result in results:
        recipe, trained = result["recipe"], result["trained"]
        value = result["metrics"][recipe.metric]
        made.add_row(
            recipe.name,
            recipe.metric,
            f"[{'green' if recipe.reached(value) else 'red'}]{value:.4g}[/]",
            f"{recipe.expected:g}",
            f"{trained['trainable']:,}",
            f"{result['seconds'] / 60:.1f}",
            str(recipe.minutes),
            f"{trained['peak_memory'] / 1e9:.2f}",
        )
    Console().print(made)


def record(results: list[dict[str, Any]], path: Path) -> None:
    """Add the figures to a table, one line a metric."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if fresh:
            writer.writerow(("recipe", "metric", "value", "minutes", "trainable", "gigabytes", "command"))
        for result in results:
            name, trained = result["recipe"].name, result["trained"]
            for metric, value in result["metrics"].items():
                minutes, size = f"{result['seconds'] / 60:.2f}", f"{trained['peak_memory'] / 1e9:.3f}"
                command = f"python recipes/run.py {name}"
                writer.writerow((name, metric, f"{value:.6g}", minutes, trained["trainable"], size, command))


def main() -> None:
    known = recipes()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--work", type=Path, default=Path("."))
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"there is no recipe {unknown[0]!r}; expected any of {', '.join(known)}")
    os.chdir(options.work)
    results = [run(known[name], options.steps) for name in options.names or known]
    show(results)
    if not options.steps:
        record(results, Path("results.csv"))
        missed = [
            one["recipe"].name for one in results if not one["recipe"].reached(one["metrics"][one["recipe"].metric])
        ]
        if missed:
            raise SystemExit(f"Below what was expected: {', '.join(missed)}.")


if __name__ == "__main__":
    main()
