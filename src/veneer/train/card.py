"""What a run says of itself on the model card beside its weights."""

from __future__ import annotations

from veneer.train.prepare import Plan
from veneer.train.progress import Progress
from veneer.train.sets import data_name


def figures(plan: Plan, progress: Progress, processes: int) -> dict[str, str]:
    """Lines for the card: the data, how it was trained, and every held-out metric before and after."""
    config, report = plan.config, plan.train_set.report
    size = f"{config.batch_size * config.accumulation * processes} examples a step"
    head = f", {config.head_learning_rate:g} of the head" if config.head_learning_rate is not None else ""
    rate = f"learning rate {config.learning_rate:g}{head} ({config.schedule})"
    trained = f", {report.trained_tokens:,} trained tokens" if report.trained_tokens else ""
    found = {
        "task": config.task,
        "steps": f"{progress.step} of {plan.steps}",
        "training data": f"{data_name(config.data)}, {report.examples:,} examples{trained}",
        "trained with": f"{config.optimizer}, {rate}, {size}, {config.precision}, seed {config.seed}",
    }
    before, after = progress.before, progress.after
    for name in after or {}:
        known = (before or {}).get(name)
        first = f"{known:.4f} before, " if known is not None else ""
        found[f"held-out {name.replace('_', ' ')}"] = f"{first}{after[name]:.4f} after"  # type: ignore[index]
    return found
