"""The training loop, on accelerate: steps, held-out loss, what is kept, and the record of it all."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from torch import nn

from veneer.core.disk import write_text
from veneer.core.errors import TrainingError
from veneer.core.records import RunRecord
from veneer.engine.allocator import keep_freed_memory
from veneer.tasks.task import Tally, measure
from veneer.train import checkpoint
from veneer.train.arithmetic import settled
from veneer.train.batches import batches_from
from veneer.train.config import RunConfig
from veneer.train.interrupt import Interrupt
from veneer.train.learner import Learner
from veneer.train.log import ProgressBar, RunLog, finite, peak_memory
from veneer.train.prepare import Plan, prepare
from veneer.train.savings import saving
from veneer.train.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG_NAME = "run.yaml"
RESULT_NAME = "result.json"


@dataclass(frozen=True)
class RunResult:
    """A finished run: its record, and the trained model as it was after the last step."""

    record: RunRecord
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer that was used, with the chat template that was used."""
    folder: Path
    """The run folder."""


def train(
    config: RunConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_rows: Iterable[Mapping[str, Any]] | None = None,
    eval_rows: Iterable[Mapping[str, Any]] | None = None,
    on_ready: Callable[[Plan], None] | None = None,
    console: Console | None = None,
) -> RunResult:
    """Run one training from config to run folder.

    >>> result = train(RunConfig(model="./model", data="train.jsonl", output="runs/first"))
    >>> result.record.held_out_after["loss"]

    The folder gets ``run.yaml``, ``log.jsonl``, ``result.json``, ``best/`` (lowest held-out loss) and ``last/``.
    Ctrl-C ends the run after the step in hand and keeps what was learned; the record says ``interrupted``.

    Args:
        config: the run; its ``model`` and ``data`` are not read where the next four give them.
        model: a loaded model, trained in place.
        tokenizer: its tokenizer.
        train_rows: examples as dicts with the columns that data files have.
        eval_rows: held-out examples.
        on_ready: called before the first step with all that is known by then.
        console: where to draw a progress bar; None draws none.

    Raises:
        UsageError, ConfigError, DataError: whatever is wrong, before anything is written.
        TrainingError: a loss or gradient that is not finite; what was learned before is kept in ``last/``.
        DiskError: the disk is full or not writable.
    """
    from accelerate.utils import set_seed

    keep_freed_memory()
    accelerator = _accelerator(config.precision)
    config, measured = settled(config, model)
    accelerator = _accelerator(config.precision) if measured else accelerator
    set_seed(config.seed)
    plan = prepare(
        config,
        model=model,
        tokenizer=tokenizer,
        train_rows=train_rows,
        eval_rows=eval_rows,
        processes=accelerator.num_processes,
    )
    plan = dataclasses.replace(plan, notes=(*measured, *plan.notes))
    if on_ready is not None and accelerator.is_main_process:
        on_ready(plan)
    # A slower process must have found the folder empty before the first one writes into it.
    accelerator.wait_for_everyone()
    return Loop(plan, accelerator).run(console if accelerator.is_main_process else None)


def _accelerator(precision: str) -> Accelerator:
    """An accelerator of this precision. accelerate keeps it for the whole process, which may do several runs."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    wanted = "bf16" if precision == "bf16" else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=wanted)


@final
class Loop:
    """One run on its way."""

    def __init__(self, plan: Plan, accelerator: Accelerator) -> None:
        self.plan = plan
        self.config = plan.config
        self.accelerator = accelerator
        self.folder = Path(plan.config.output).expanduser()
        self.learner = Learner(plan, accelerator)
        self.bare, self.model = self.learner.bare, self.learner.model
        self.interrupt = Interrupt(self._on_interrupt)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.recent: deque[Tally] = deque(maxlen=max(1, plan.steps // 10))
        self.unlogged = Tally()
        self.before: dict[str, float] | None = None
        self.after: dict[str, float] | None = None
        self.measured_at = -1
        self.best_loss = math.inf
        self.best_step: int | None = None
        self.saved_last = False

    def run(self, console: Console | None) -> RunResult:
        """All steps, with the measurements around them."""
        self.log = RunLog(self.folder, Trackers(self.config))
        self._begin()
        interrupted = False
        self.bar = ProgressBar(console, self.plan.steps, self.plan.steps_per_epoch)
        saved = saving(self.plan, self.model, self.accelerator, self.log, self.bar)
        with self.log, self.bar, saved, self.interrupt:
            try:
                self.before = self._measure()
                self._steps()
                interrupted = self.interrupt.asked and self.step < self.plan.steps
            except KeyboardInterrupt:
                interrupted = True
            except TrainingError as error:
                self.log.write("error", step=self.step, message=str(error))
                self._save_last()
                raise
            if interrupted and self.step == 0:
                self._undo()
                raise KeyboardInterrupt
            self._save_last()
        self.bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.bare.eval()
        self.plan.speed.undo()
        record = self._record(interrupted)
        if self.accelerator.is_main_process:
            write_text(self.folder / RESULT_NAME, json.dumps(finite(record.to_dict()), indent=2) + "\n")
            self.log.write("end", step=self.step, interrupted=interrupted)
        return RunResult(record, self.bare, self.plan.tokenizer, self.folder)

    # The parts of a run

    def _begin(self) -> None:
        if not self.accelerator.is_main_process:
            return
        write_text(self.folder / CONFIG_NAME, self.config.to_yaml())
        held_out = self.plan.held_out
        self.log.start(
            model=self.config.model,
            task=self.config.task,
            method=self.config.method,
            steps=self.plan.steps,
            trainable=self.plan.trained.trainable,
            total=self.plan.trained.total,
            data=self.plan.train_set.report.to_dict(),
            held_out_data=held_out.report.to_dict() if held_out else None,
            notes=list(self.plan.notes),
        )

    def _undo(self) -> None:
        """Nothing was learned: leave no folder that would be in the way of the next attempt."""
        (self.folder / CONFIG_NAME).unlink(missing_ok=True)
        self.log.undo()

    def _steps(self) -> None:
        self.model.train()
        every = self.config.eval_every or self.plan.steps_per_epoch
        process, device = self.accelerator.process_index, self.accelerator.device
        each = batches_from(self.plan, self.step, process=process, device=device)
        while self.step < self.plan.steps and not self.interrupt.asked:
            began = time.perf_counter()
            taken = self.learner.take(next(each), self.step + 1)
            self.seconds += time.perf_counter() - began
            self.step += 1
            self.tokens += taken.tokens
            self.recent.append(taken.tally)
            self._log_step(taken.tally, taken.norm)
            if self.step % every == 0 or self.step == self.plan.steps:
                self._evaluate()

    def _log_step(self, tally: Tally, norm: float) -> None:
        self.unlogged += tally
        figures = {"tokens_per_second": self.tokens / self.seconds, "memory": peak_memory()}
        rate = self.learner.learning_rate
        self.bar.update(self.step, loss=tally.loss / tally.units, learning_rate=rate, **figures)
        if self.step % self.config.log_every == 0 or self.step == self.plan.steps:
            if self.accelerator.is_main_process:
                self.log.write(
                    "step",
                    step=self.step,
                    loss=self.unlogged.loss / self.unlogged.units,
                    trained_tokens=self.unlogged.units,
                    learning_rate=rate,
                    gradient_norm=norm,
                    **figures,
                )
            self.unlogged = Tally()

    def _evaluate(self) -> None:
        self.after = self._measure()
        self.measured_at = self.step
        if self.after is not None and self.after["loss"] < self.best_loss:
            self.best_loss, self.best_step = self.after["loss"], self.step
            self._save(checkpoint.BEST)

    def _measure(self) -> dict[str, float] | None:
        """Metrics on the held-out data now, logged and shown; None when nothing is held out."""
        held_out = self.plan.held_out
        if held_out is None:
            return None
        tally = measure(
            self.plan.task,
            self.model,
            held_out.examples,
            self.plan.tokenizer,
            batch_size=self.config.batch_size,
            device=self.accelerator.device,
            packed=self.plan.batching.packed,
            on_share=self._on_share,
        )
        metrics = self.plan.task.metrics(tally)
        if self.accelerator.is_main_process:
            self.log.write("eval", step=self.step, **metrics)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.bar.note(f"step {self.step}, held out: {shown}")
        self.bar.training()
        return metrics

    def _on_share(self, share: float) -> None:
        if self.interrupt.asked:
            raise KeyboardInterrupt
        self.bar.measuring(share)

    def _on_interrupt(self) -> None:
        self.bar.note("Interrupted: finishing this step, then saving what was learned. Ctrl-C again stops at once.")

    # What it keeps

    def _save_last(self) -> None:
        if self.step and not self.saved_last:
            self._save(checkpoint.LAST)
            self.saved_last = True

    def _save(self, name: str) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
            checkpoint.save(model, self.plan.tokenizer, self.folder / name, figures=self._figures())

    def _figures(self) -> dict[str, str]:
        config = self.config
        size = f"{config.batch_size * config.accumulation * self.accelerator.num_processes} examples a step"
        rate = f"learning rate {config.learning_rate:g} ({config.schedule})"
        figures = {"steps": f"{self.step} of {self.plan.steps}", "training data": self._data_name()}
        figures["trained with"] = f"{config.optimizer}, {rate}, {size}, {config.precision}, seed {config.seed}"
        if self.before and self.after:
            figures["held-out loss"] = f"{self.before['loss']:.4f} before, {self.after['loss']:.4f} after"
        return figures

    def _data_name(self) -> str:
        report = self.plan.train_set.report
        name = Path(self.config.data).name if self.config.data else "given by the program"
        return f"{name}, {report.examples:,} examples, {report.trained_tokens:,} trained tokens"

    def _record(self, interrupted: bool) -> RunRecord:
        recent = sum(self.recent, Tally())
        held_out = self.plan.held_out
        return RunRecord(
            model=self.config.model or getattr(self.bare.config, "name_or_path", None) or None,
            task=self.config.task,
            method=self.config.method,
            steps=self.step,
            planned_steps=self.plan.steps,
            interrupted=interrupted,
            seconds=self.seconds,
            tokens_per_second=self.tokens / self.seconds if self.seconds else 0.0,
            peak_memory=peak_memory(),
            trainable=self.plan.trained.trainable,
            total=self.plan.trained.total,
            train_loss=recent.loss / recent.units if recent.units else None,
            held_out_before=self.before,
            held_out_after=self.after if self.measured_at == self.step else None,
            best_loss=self.best_loss if self.best_step is not None else None,
            best_step=self.best_step,
            data=self.plan.train_set.report.to_dict(),
            held_out_data=held_out.report.to_dict() if held_out else None,
            best=str(self.folder / checkpoint.BEST) if self.best_step is not None else None,
            last=str(self.folder / checkpoint.LAST),
            notes=self.plan.notes,
            quantize=self.config.quantize,
        )
