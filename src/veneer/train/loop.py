"""The training loop, on accelerate: steps, held-out loss, what is kept, and the record of it all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from veneer.core.disk import write_text
from veneer.core.errors import TrainingError
from veneer.core.records import RunRecord
from veneer.engine.allocator import keep_freed_memory
from veneer.tasks.kept import text
from veneer.tasks.task import Tally, measure
from veneer.train import checkpoint, state
from veneer.train.arithmetic import settled
from veneer.train.batches import batches_from
from veneer.train.card import figures
from veneer.train.config import RunConfig
from veneer.train.interrupt import Interrupt
from veneer.train.learner import Learner
from veneer.train.log import ProgressBar, RunLog, finite, peak_memory
from veneer.train.prepare import Plan, prepare
from veneer.train.processes import joined
from veneer.train.progress import Progress
from veneer.train.resume import CONFIG_NAME, RESULT_NAME, agreement, check, picked_up, rewind, tidy
from veneer.train.samples import Sample, Samples, goals, plain
from veneer.train.savings import saving
from veneer.train.strategy import check_model
from veneer.train.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console, RenderableType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunResult:
    """A finished run: its record, and the trained model as it was after the last step."""

    record: RunRecord
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer that was used, with the chat template that was used."""
    folder: Path
    """The run folder."""
    signal: int | None = None
    """The signal that ended the run before its end: SIGINT or SIGTERM."""


def train(
    config: RunConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_rows: Iterable[Mapping[str, Any]] | None = None,
    eval_rows: Iterable[Mapping[str, Any]] | None = None,
    on_ready: Callable[[Plan], None] | None = None,
    console: Console | None = None,
    draw: Callable[[Sequence[Sample]], RenderableType] | None = None,
    resume: bool = False,
) -> RunResult:
    """Run one training from config to run folder.

    >>> train(RunConfig(model="./model", data="train.jsonl", output="runs/first")).record.held_out_after["loss"]

    The folder gets ``run.yaml``, ``log.jsonl``, ``result.json``, ``best/`` (best held-out metric), ``last/`` and
    ``checkpoints/``, from which a run goes on that was killed at any moment. Ctrl-C and SIGTERM end the run after the
    step in hand and keep what was learned; the record says ``interrupted``.

    Args:
        config: the run; its ``model`` and ``data`` are not read where the next four give them.
        model: a loaded model, trained in place.
        tokenizer: its tokenizer.
        train_rows: examples as dicts with the columns that data files have.
        eval_rows: held-out examples.
        on_ready: called before the first step with all that is known by then.
        console: where to draw a progress bar; None draws none.
        draw: how to show the answers of ``config.samples`` there.
        resume: go on with the run that was stopped in ``config.output`` (see ``resume.resumed``), to the same weights.

    Raises:
        UsageError, ConfigError, DataError: whatever is wrong, before anything is written.
        TrainingError: a loss or gradient is not finite, or a loss explodes; what was learned before is kept.
        DiskError: the disk is full or not writable.
    """
    from accelerate.utils import set_seed

    keep_freed_memory()
    accelerator = joined(config)
    config, measured = settled(config, model)
    accelerator = joined(config) if measured else accelerator
    set_seed(config.seed)
    saved, config, said = picked_up(config, accelerator.num_processes) if resume else (None, config, [])
    console = console if accelerator.is_main_process else None
    given: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "train_rows": train_rows, "eval_rows": eval_rows}
    plan = prepare(config, **given, processes=accelerator.num_processes, resume=resume, console=console)
    if saved is not None:
        check(saved, plan)
    plan = replace(plan, notes=(*said, *measured, *plan.notes, *check_model(accelerator, plan.trained.model)))
    if on_ready is not None and accelerator.is_main_process:
        on_ready(plan)
    # A slower process must have found the folder empty before the first one writes into it.
    accelerator.wait_for_everyone()
    return Loop(plan, accelerator, saved, draw).run(console)


@final
class Loop:
    """One run on its way."""

    def __init__(
        self,
        plan: Plan,
        accelerator: Accelerator,
        saved: state.Saved | None = None,
        draw: Callable[[Sequence[Sample]], RenderableType] | None = None,
    ) -> None:
        self.plan = plan
        self.config = plan.config
        self.accelerator = accelerator
        self.folder = Path(plan.config.output).expanduser()
        self.saved = saved
        # Taken before anything is learned.
        self.about = agreement(plan)
        self.learner = Learner(plan, accelerator)
        self.bare, self.model = self.learner.bare, self.learner.model
        self.interrupt = Interrupt(self._on_interrupt)
        self.progress = Progress.of(plan.steps)
        self.stepping = False
        self.saved_last = False
        self.details: dict[str, Any] = {}
        self.samples = Samples(plan) if plan.asked else None
        self.draw = draw

    def run(self, console: Console | None) -> RunResult:
        """All steps, with the measurements around them."""
        self.log = RunLog(self.folder, Trackers(self.config))
        self._begin()
        interrupted = False
        self.bar = ProgressBar(console, self.plan.steps, self.plan.steps_per_epoch)
        saving_memory = saving(self.plan, self.model, self.accelerator, self.log, self.bar)
        with self.plan.speed, self.log, self.bar, saving_memory, self.interrupt:
            try:
                self._set_out()
                interrupted = self._steps()
            except KeyboardInterrupt:
                interrupted = True
            except TrainingError as error:
                self._write("error", step=self.progress.step, message=str(error))
                self._save_last()
                raise
            if interrupted and self.progress.step == 0:
                self._undo()
                raise KeyboardInterrupt
            self._save_last()
        self.bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.bare.eval()
        record = self._record(interrupted)
        if self.accelerator.is_main_process:
            write_text(self.folder / RESULT_NAME, json.dumps(finite(record.to_dict()), indent=2) + "\n")
        self._write("end", step=self.progress.step, interrupted=interrupted)
        return RunResult(record, self.bare, self.plan.tokenizer, self.folder, self.interrupt.signal)

    # The parts of a run

    def _begin(self) -> None:
        if not self.accelerator.is_main_process:
            return
        tidy(self.folder)
        write_text(self.folder / CONFIG_NAME, self.config.to_yaml())
        rewind(self.folder, self.saved.values["progress"]["log_bytes"] if self.saved else 0)
        if self.saved is not None:
            if self.samples is not None:
                self.samples.goes_on_from(self.log.events())
            self.log.resume(step=self.saved.step, notes=list(self.plan.notes))
            return
        held_out = self.plan.held_out
        self.log.start(
            model=self.config.model,
            task=self.config.task,
            method=self.config.method,
            steps=self.plan.steps,
            processes=self.accelerator.num_processes,
            fingerprint=self.plan.train_set.fingerprint,
            trainable=self.plan.trained.trainable,
            total=self.plan.trained.total,
            data=self.plan.train_set.report.to_dict(),
            parts=[asdict(part) for part in self.plan.parts],
            held_out_data=held_out.report.to_dict() if held_out else None,
            notes=list(self.plan.notes),
        )

    def _set_out(self) -> None:
        """From the checkpoint, or from a measurement of what is not yet trained."""
        if self.saved is None:
            self.progress.before = self._measure()
            return
        self.progress = state.restore(self.saved, self.learner, self.accelerator)
        self.saved = None

    def _undo(self) -> None:
        """Nothing was learned: leave no folder that would be in the way of the next attempt."""
        (self.folder / CONFIG_NAME).unlink(missing_ok=True)
        self.log.undo()

    def _steps(self) -> bool:
        """All steps that are left; whether a signal came before the last one."""
        self.model.train()
        every = self.config.eval_every or self.plan.steps_per_epoch
        process, device = self.accelerator.process_index, self.accelerator.device
        each = batches_from(self.plan, self.progress.step, process=process, device=device)
        if self.progress.step and self.progress.step % every == 0 and self.progress.measured_at != self.progress.step:
            # The signal that stopped the run came while it was measuring.
            self._evaluate()
        while self.progress.step < self.plan.steps and not self.progress.tired(self.config.patience):
            if self._asked():
                return True
            norm = self._step(next(each))
            step, last = self.progress.step, self.progress.step == self.plan.steps
            self._log_step(norm)
            if step % every == 0 or last:
                self._evaluate()
            if step % (self.config.save_every or every) == 0 or last:
                self._keep()
        if self.progress.step < self.plan.steps:
            self.bar.note(f"Nothing better than at step {self.progress.best_step} came in a while: stopped early.")
        return False

    def _step(self, group: list[dict[str, Any]]) -> float:
        """One optimiser step; the gradient's norm before clipping."""
        began = time.perf_counter()
        self.stepping = True
        taken = self.learner.take(
            group, self.progress.step + 1, lambda loss: self.progress.explodes(loss, self.config.explosion)
        )
        self.progress.take(taken.tally, tokens=taken.tokens, seconds=time.perf_counter() - began)
        self.stepping = False
        return taken.norm

    def _log_step(self, norm: float) -> None:
        progress = self.progress
        figures = {"tokens_per_second": progress.tokens / progress.seconds, "memory": peak_memory()}
        latest = progress.recent[-1]
        rate = self.learner.learning_rate
        self.bar.update(progress.step, loss=latest.loss / max(1, latest.units), learning_rate=rate, **figures)
        if progress.step % self.config.log_every == 0 or progress.step == self.plan.steps:
            self._write(
                "step",
                step=progress.step,
                loss=progress.unlogged.loss / max(1, progress.unlogged.units),
                trained_tokens=progress.unlogged.units,
                learning_rate=rate,
                gradient_norm=norm,
                **figures,
            )
            progress.unlogged = Tally()

    def _evaluate(self) -> None:
        metrics = self._measure()
        if metrics is None:
            return
        lower = goals(self.plan.task, self.config.samples)[self.config.best_metric] == "min"
        if self.progress.judge(metrics, self.config, lower=lower):
            self._save(checkpoint.BEST)

    def _measure(self) -> dict[str, float] | None:
        """Metrics on the held-out data now, logged and shown; None when nothing is held out."""
        held_out = self.plan.held_out
        if held_out is None:
            return None
        measured = measure(
            self.plan.task,
            self.model,
            held_out.examples,
            self.plan.tokenizer,
            batch_size=self.config.batch_size,
            device=self.accelerator.device,
            packed=self.plan.batching.packed,
            on_share=self._on_share,
        )
        metrics = {**measured.metrics, **self._sampled()}
        self.details = measured.details
        self._write("eval", step=self.progress.step, **metrics)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.bar.note(f"step {self.progress.step}, held out: {shown}")
        self.bar.training()
        return metrics

    def _sampled(self) -> dict[str, float]:
        """The metrics of answers to some held-out prompts, which are logged and shown."""
        if self.samples is None:
            return {}
        found, judged = self.samples.take(self.bare, self._on_share)
        self._write("samples", step=self.progress.step, samples=plain(found))
        if self.draw is not None:
            self.bar.show(self.draw(found))
        return judged

    def _on_share(self, share: float) -> None:
        # Alone: processes measure the same, but not at the same pace.
        if self.interrupt.asked and self.accelerator.num_processes == 1:
            raise KeyboardInterrupt
        self.bar.measuring(share)

    def _on_interrupt(self) -> None:
        self.bar.note("Interrupted: finishing this step, then saving what was learned. Once more stops at once.")

    def _asked(self) -> bool:
        """Whether any process was told to end: all end at the same step, since they wait for each other."""
        if self.accelerator.num_processes == 1:
            return self.interrupt.asked
        mine = torch.tensor(float(self.interrupt.asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(mine, "sum") > 0)

    # What it keeps

    def _write(self, event: str, **values: Any) -> None:
        if self.accelerator.is_main_process:
            self.log.write(event, **values)

    def _keep(self) -> None:
        """Write a checkpoint to resume from, and let go of the oldest."""
        if self.config.keep == 0 or self.stepping:
            return
        if self.accelerator.is_main_process:
            self.progress.log_bytes = self.log.path.stat().st_size
        state.save(self.folder, self.learner, self.progress, self.accelerator, about=self.about)
        if self.accelerator.is_main_process:
            state.prune(self.folder, keep=self.config.keep, every=self.config.keep_every)

    def _save_last(self) -> None:
        if self.progress.step and not self.saved_last:
            self._keep()
            self._save(checkpoint.LAST)
            self.saved_last = True

    def _save(self, name: str) -> None:
        self.accelerator.wait_for_everyone()
        tensors = self.learner.sharing.saved_state(keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            checkpoint.save(
                self.learner.bare,
                self.plan.tokenizer if self.plan.task.pretrained else None,
                self.folder / name,
                figures=figures(self.plan, self.progress, self.accelerator.num_processes),
                task=text(self.config.task, self.plan.task),
                state_dict=tensors,
            )

    def _record(self, interrupted: bool) -> RunRecord:
        progress, held_out = self.progress, self.plan.held_out
        recent = sum(progress.recent, Tally())
        return RunRecord(
            model=self.config.model or getattr(self.bare.config, "name_or_path", None) or None,
            task=self.config.task,
            method=self.config.method,
            steps=progress.step,
            planned_steps=self.plan.steps,
            interrupted=interrupted,
            seconds=progress.seconds,
            tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
            peak_memory=peak_memory(),
            trainable=self.plan.trained.trainable,
            total=self.plan.trained.total,
            train_loss=recent.loss / recent.units if recent.units else None,
            held_out_before=progress.before,
            held_out_after=progress.after if progress.measured_at == progress.step else None,
            best_loss=progress.best["loss"] if progress.best else None,
            best_step=progress.best_step,
            data=self.plan.train_set.report.to_dict(),
            held_out_data=held_out.report.to_dict() if held_out else None,
            best=str(self.folder / checkpoint.BEST) if progress.best_step is not None else None,
            last=str(self.folder / checkpoint.LAST),
            notes=self.plan.notes,
            quantize=self.config.quantize,
            parts=self.plan.parts,
            details=self.details if progress.measured_at == progress.step else {},
        )
