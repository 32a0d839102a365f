"""``veneer train``: from a model and a data file to a run folder."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.fields import adapter_options
from veneer.cli.output import console
from veneer.cli.run_fields import run_options
from veneer.core.errors import UsageError
from veneer.core.records import RunRecord
from veneer.train.config import RunConfig

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.data.encode import EncodingReport
    from veneer.tasks.task import AbstractTask
    from veneer.train.prepare import Plan


@adapter_options
@run_options()
def train(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A YAML file with the fields below; flags override it.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The folder of a run that was stopped, to go on with.")
    ] = None,
    *,
    run_values: dict[str, Any],
    adapter_values: dict[str, Any],
) -> RunRecord:
    """Fine-tune a model on JSONL, CSV or Parquet.

    Rows have messages, prompt + completion, instruction (+ input) + output, or text. The run folder gets run.yaml,
    log.jsonl, loss.png, result.json, README.md, best/, last/ and checkpoints/. Ctrl-C and SIGTERM save what was
    learned and exit with 130 and 143; veneer train --resume ./run goes on, also after a crash.

    Example: veneer train --model ./model --data train.jsonl --output ./run --r 16 --target-modules all-linear
    """
    if resume is not None and config is not None:
        raise UsageError("Both --resume and --config are given; a run goes on with its own config.")

    from accelerate import PartialState

    from veneer.report.preview import samples
    from veneer.train import loop
    from veneer.train.resume import resumed

    values = {**run_values, **adapter_values}
    resolved = RunConfig.read(config, **values) if resume is None else resumed(resume, **values)

    screen = console()
    result = loop.train(
        resolved,
        on_ready=lambda plan: _show_plan(screen, plan),
        console=console(stderr=True),
        draw=samples,
        resume=resume is not None,
    )
    if PartialState().is_main_process:
        # Of several processes one tells and draws.
        _show_record(screen, result.record, _drawn(result.folder, result.record))
    if result.record.interrupted:
        raise typer.Exit(128 + (result.signal or signal.SIGINT))
    return result.record


def _drawn(folder: Path, record: RunRecord) -> list[Path]:
    """The pictures of a run, and the page that shows them, in its folder."""
    from veneer.report.confusion import CONFUSION_NAME, confusion_plot
    from veneer.report.overview import write_overview
    from veneer.report.plots import loss_plot

    pictures = [loss_plot(folder)]
    if "confusion" in record.details:
        pictures.append(confusion_plot(record.details["confusion"], folder / CONFUSION_NAME))
    write_overview(folder, record)
    return pictures


def _show_plan(screen: Console, plan: Plan) -> None:
    """What is about to be trained, before the first step."""
    from veneer.report.preview import preview
    from veneer.report.tables import facts

    trained = plan.trained
    rows = {
        "training data": _counts(plan.train_set.report, plan.task),
        "held out": _counts(plan.held_out.report, plan.task) if plan.held_out else "nothing",
        "trainable parameters": f"{trained.trainable:,} of {trained.total:,} ({trained.trainable / trained.total:.2%})",
        "steps": f"{plan.steps:,}, {plan.steps_per_epoch:,} an epoch",
    }
    screen.print(preview(plan.preview(), origin=plan.shown.origin))
    screen.print(facts(rows))
    for note in plan.notes:
        screen.print(f"note: {note}", style="yellow", markup=False)


def _counts(report: EncodingReport, task: AbstractTask) -> str:
    from veneer.tasks.writing import AbstractWriter

    text = f"{report.examples:,} examples"
    if isinstance(task, AbstractWriter):
        of = f" of {report.tokens:,}" if report.tokens else ""
        text += f", {report.trained_tokens:,}{of} tokens trained"
    text += f", {report.truncated:,} truncated"
    if report.truncated:
        text += f" (by {report.tokens_cut:,} tokens)"
    if report.left_out:
        text += f", {report.left_out:,} left out for having no token to train"
    return text


def _show_record(screen: Console, record: RunRecord, pictures: list[Path]) -> None:
    from veneer.report.tables import facts, per_label_table

    before, after = record.held_out_before, record.held_out_after
    rows: dict[str, str] = {"steps": f"{record.steps:,} of {record.planned_steps:,}"}
    if record.train_loss is not None:
        rows["training loss, last steps"] = f"{record.train_loss:.4f}"
    if before and record.best_loss is not None:
        best = f"best {record.best_loss:.4f} after step {record.best_step:,}"
        rows["held-out loss"] = (
            f"{before['loss']:.4f} before, " + (f"{after['loss']:.4f} after, " if after else "") + best
        )
    for name in [name for name in after or {} if name not in ("loss", "perplexity")]:
        rows[f"held-out {name.replace('_', ' ')}"] = (
            f"{(before or {}).get(name, float('nan')):.4f} before, {(after or {})[name]:.4f} after"
        )
    rows["speed"] = f"{record.tokens_per_second:,.0f} tokens a second for {record.seconds:,.0f} s"
    rows["most memory"] = f"{record.peak_memory / 1e9:.2f} GB"
    rows["saved"] = ", ".join(path for path in (record.best, record.last, *map(str, pictures)) if path)
    screen.print(facts(rows))
    if record.details.get("per_label"):
        screen.print(per_label_table(record.details["per_label"]))
    if before and record.best_loss is not None and record.best_loss >= before["loss"]:
        screen.print("note: The held-out loss never fell below where it began.", style="yellow")
    if record.model and not record.interrupted:
        kept = record.best or record.last
        flags = f"--model {record.model} --adapter {kept}" if record.method == "lora" else f"--model {kept}"
        verb, more = ("generate", '--prompt "..."') if record.task == "causal_lm" else ("predict", "--data ...")
        more = f"--code ... {more}" if record.task == "other" else more
        screen.print(f"Next: veneer {verb} {flags} {more}", markup=False, soft_wrap=True)
