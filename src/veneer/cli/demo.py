"""``veneer demo``: the whole job on a small real model, from fetching it to a merged copy, in a few minutes."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.merge import merge_into_folder
from veneer.cli.output import console, plain
from veneer.core.disk import write_text
from veneer.core.errors import UsageError, VeneerError
from veneer.core.hub import WEIGHTS_NAME
from veneer.core.records import MergeReport, RunRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from veneer.data.docstrings import DocstringPair
    from veneer.train.loop import RunResult

_MARK = "demo.json"
_HELD_OUT = 32
_SHOWN = 3
_ANSWER_TOKENS = 32
_NEW_FUNCTION = "def count_words(text, ignore_case=True):"
# Chosen so that the held-out loss falls clearly within 30 steps, which take two cores about one and a half minutes.
_SETTINGS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "learning_rate": 1e-3,
    "batch_size": 8,
    "epochs": 1,
    "eval_every": 10,
    "warmup": 0.1,
}


@dataclass(frozen=True)
class HeldOutAnswer:
    """One held-out function, as the model documented it before and after training."""

    signature: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class DemoReport:
    """Everything that the demo shows. Sizes in bytes, times in seconds."""

    model: str
    output: str
    run: RunRecord
    answers: tuple[HeldOutAnswer, ...]
    adapter_bytes: int
    model_bytes: int
    reload_difference: float
    """The largest difference of a logit between the trained adapter and the one read back from disk."""
    merge: MergeReport
    plot: str
    commands: tuple[str, ...]
    """What to go on with."""
    seconds: float


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where to write; must not exist.")] = Path("veneer-demo"),
    model: Annotated[
        str | None, typer.Option(help="Use this chat model instead of SmolLM2-135M-Instruct.", show_default=False)
    ] = None,
    examples: Annotated[int, typer.Option(help="Functions to learn from.", min=8)] = 240,
    seed: Annotated[int, typer.Option(help="Chooses and orders the functions.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier demo.")] = False,
) -> DemoReport:
    """Fine-tune a small real model on this machine, and check every step of it.

    Teaches SmolLM2-135M-Instruct (fetched once, 93 MB) to write docstrings, from the functions of your own Python
    standard library. Then reloads the adapter, merges it, and compares the logits each time. Takes about four
    minutes on two cores.

    Example: veneer demo --output ./veneer-demo
    """
    began = time.perf_counter()

    def say(text: str) -> None:
        console(stderr=True).print(f"[dim]{time.perf_counter() - began:5.0f} s[/]  {text}")

    make_room(output, force=force)
    report = _run(output, model, examples, seed, say, began)
    write_text(output / _MARK, json.dumps(plain(report), indent=2) + "\n")
    _show(report)
    return report


def make_room(output: Path, *, force: bool) -> None:
    """Claim a new output folder.

    Args:
        output: the folder; parents are made.
        force: remove the folder of an earlier demo first.

    Raises:
        UsageError: it exists, and ``force`` is not given or it is not a demo's.
    """
    if output.exists():
        if not force:
            raise UsageError(f"The output {str(output)!r} exists already; name another with --output, or use --force.")
        if not (output / _MARK).is_file():
            raise UsageError(f"The output {str(output)!r} is no earlier demo's, so --force leaves it; name another.")
        shutil.rmtree(output)
    write_text(output / _MARK, json.dumps({"finished": False}) + "\n")


def _run(
    output: Path, model: str | None, examples: int, seed: int, say: Callable[[str], None], began: float
) -> DemoReport:
    from veneer.data.docstrings import docstring_pairs
    from veneer.report.plots import loss_plot
    from veneer.tasks.loading import adapter_folder, load_model, load_tokenizer
    from veneer.tasks.smollm import smollm

    name = smollm(say) if model is None else model
    pairs, held_out = docstring_pairs(examples, _HELD_OUT, seed=seed)
    _write_rows(output / "train.jsonl", pairs)
    _write_rows(output / "held_out.jsonl", held_out)
    say(f"{len(pairs)} functions to learn from, {len(held_out)} held out in other modules; loading the model ...")
    tokenizer, base = load_tokenizer(name), load_model(name)
    model_bytes = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    say("Asking the untrained model ...")
    before = _ask(base, tokenizer, held_out[:_SHOWN])
    say("Training ...")
    result = _train(name, output / "run", seed, base, tokenizer, pairs, held_out)
    say("Asking the trained model ...")
    after = _ask(result.model, tokenizer, held_out[:_SHOWN])
    say("Reading the adapter back into a fresh model, and comparing the logits ...")
    adapter = adapter_folder(result.folder)
    reload_difference = _reloaded(name, adapter, result.model)
    say("Merging, and comparing the logits ...")
    merge = merge_into_folder(name, [str(adapter)], output / "merged", verify=True)
    shown = zip(held_out[:_SHOWN], before, after, strict=True)
    return DemoReport(
        model=name,
        output=str(output),
        run=result.record,
        answers=tuple(HeldOutAnswer(pair.signature, pair.summary, old, new) for pair, old, new in shown),
        adapter_bytes=(adapter / WEIGHTS_NAME).stat().st_size,
        model_bytes=model_bytes,
        reload_difference=reload_difference,
        merge=merge,
        plot=str(loss_plot(result.folder)),
        commands=_commands(name, output),
        seconds=time.perf_counter() - began,
    )


def _write_rows(path: Path, pairs: Sequence[DocstringPair]) -> None:
    write_text(path, "".join(json.dumps(pair.row) + "\n" for pair in pairs))


def _train(
    name: str,
    folder: Path,
    seed: int,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[DocstringPair],
    held_out: Sequence[DocstringPair],
) -> RunResult:
    from veneer.train import loop
    from veneer.train.config import RunConfig

    result = loop.train(
        RunConfig(model=name, output=str(folder), seed=seed, **_SETTINGS),
        model=base,
        tokenizer=tokenizer,
        train_rows=[pair.row for pair in pairs],
        eval_rows=[pair.row for pair in held_out],
        console=console(stderr=True),
    )
    if result.record.interrupted:
        raise typer.Exit(130)
    return result


def _ask(model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[DocstringPair]) -> list[str]:
    """The model's docstring for each function, always its likeliest one."""
    from veneer.data.docstrings import INSTRUCTION
    from veneer.evaluate.generation import answer, encode
    from veneer.tasks.sampling import Sampling

    sampling = Sampling(max_new_tokens=_ANSWER_TOKENS)
    asked = (encode(tokenizer, pair.signature, system=INSTRUCTION) for pair in pairs)
    return [answer(model, tokenizer, encoded, sampling).text.strip() for encoded in asked]


def _reloaded(name: str, adapter: Path, trained: Any) -> float:
    """The largest difference of a logit between the trained model and a fresh one with the saved adapter.

    Raises:
        VeneerError: it is more than rounding.
    """
    from veneer.adapters.model import PeftModel
    from veneer.evaluate.equality import difference, fixed_input, outputs
    from veneer.tasks.loading import load_model

    fresh = load_model(name)
    given = fixed_input(fresh)
    found = outputs(PeftModel.from_pretrained(fresh, adapter), given)
    compared = difference(outputs(trained, given), found, fresh.dtype)
    if not compared.equal:
        raise VeneerError(
            f"The adapter read back from {str(adapter)!r} gives logits that differ by up to {compared.largest:.3g} "
            f"of {compared.scale:.3g}; expected the same ones."
        )
    return compared.largest


def _commands(name: str, output: Path) -> tuple[str, ...]:
    from veneer.data.docstrings import INSTRUCTION

    ask = f"--system {shlex.quote(INSTRUCTION)} --prompt {shlex.quote(_NEW_FUNCTION)}"
    model, run = shlex.quote(name), shlex.quote(str(output / "run"))
    return (
        f"veneer generate --model {model} --adapter {run} {ask}",
        f"veneer generate --model {shlex.quote(str(output / 'merged'))} {ask}",
        f"veneer eval --model {model} --adapter {run} --data {shlex.quote(str(output / 'held_out.jsonl'))}",
        f"veneer inspect {run}",
        f"veneer train --model {model} --data YOUR.jsonl --output YOUR-RUN",
    )


def _show(report: DemoReport) -> None:
    from veneer.report.tables import facts, megabytes, side_by_side

    screen = console()
    run, merge = report.run, report.merge
    assert run.held_out_before is not None
    assert run.held_out_after is not None
    for one in report.answers:
        answers = {"in the library": one.expected, "before": one.before, "after": one.after}
        screen.print()
        screen.print(side_by_side(answers, prompt=one.signature))
    before, after = run.held_out_before["loss"], run.held_out_after["loss"]
    rows = {
        "held-out loss": f"{before:.3f} before, {after:.3f} after ({run.steps} steps, {run.seconds:.0f} s of training)",
        "trainable": f"{run.trainable:,} of {run.total:,} parameters ({run.trainable / run.total:.2%})",
        "size": f"adapter {megabytes(report.adapter_bytes)}, model {megabytes(report.model_bytes)}",
        "adapter read back": _equal(report.reload_difference),
        "merged model": f"{_equal(merge.max_logit_difference)}, of {merge.logit_scale:.3g}",
        "loss plot": report.plot,
        "time": f"{report.seconds:.0f} s in all",
    }
    screen.print()
    screen.print(facts(rows))
    screen.print("\nGo on with:", style="bold")
    for command in report.commands:
        screen.print(f"  {command}", markup=False, soft_wrap=True)


def _equal(largest: float) -> str:
    return f"equal logits (largest difference {largest:.2g})"
