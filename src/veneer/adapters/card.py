"""The model card beside a saved adapter, with the figures of this very adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from veneer.core.config import PeftConfig
from veneer.core.records import MatchReport

_MARK = "<!-- Written by veneer; delete this line to keep your own edits. -->"


@dataclass(frozen=True)
class ModelCard:
    """The text of a README.md."""

    text: str

    def may_replace(self, path: Path) -> bool:
        """Whether there is no card yet, or one that veneer wrote and nobody claimed."""
        return not path.exists() or _MARK in path.read_text(encoding="utf-8", errors="replace")


def model_card(config: PeftConfig, report: MatchReport, *, bytes_on_disk: int, figures: Mapping[str, str]) -> ModelCard:
    """Describe an adapter.

    Args:
        config: its config.
        report: what it adapts.
        bytes_on_disk: the size of its tensors.
        figures: results to state, e.g. ``{"held-out loss": "1.92 -> 1.41"}``.
    """
    base = config.base_model_name_or_path or "unknown"
    ranks = Counter(target.r for target in report.targets)
    rank_text = ", ".join(f"{r} on {count} layers" for r, count in sorted(ranks.items()))
    names = Counter(target.path.split(".")[-1] for target in report.targets)
    rows = {
        "base model": base,
        "method": str(config.peft_type),
        "rank": rank_text,
        "alpha": ", ".join(f"{alpha:g}" for alpha in sorted({target.lora_alpha for target in report.targets})),
        "factor of the update": ", ".join(f"{s:g}" for s in sorted({target.scaling for target in report.targets})),
        "adapted modules": ", ".join(f"{name} x {count}" for name, count in sorted(names.items())),
        "modules trained whole": ", ".join(path for path, _ in report.saved) or "none",
        **({"trained rows of": ", ".join(path for path, _ in report.rows)} if report.rows else {}),
        "trained parameters": f"{report.trainable:,} of {report.total:,} ({report.trainable / report.total:.2%})",
        "size": f"{bytes_on_disk / 1e6:.2f} MB",
        "made with": f"veneer {version('veneer')}, torch {torch.__version__}",
        **figures,
    }
    return _card(base, rows)


def rewritten_card(config: PeftConfig, *, bytes_on_disk: int, figures: Mapping[str, str]) -> ModelCard:
    """Describe an adapter that was made from other files, with no model at hand.

    Args:
        config: its config.
        bytes_on_disk: the size of its tensors.
        figures: what it was made from and how.
    """
    base = config.base_model_name_or_path or "unknown"
    rows = {
        "base model": base,
        "method": str(config.peft_type),
        **figures,
        "size": f"{bytes_on_disk / 1e6:.2f} MB",
        "made with": f"veneer {version('veneer')}, torch {torch.__version__}",
    }
    return _card(base, rows)


def _card(base: str, rows: Mapping[str, str]) -> ModelCard:
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    front = ["---", *([f"base_model: {base}"] if base != "unknown" else []), "library_name: peft", "tags:", "- lora"]
    return ModelCard(
        "\n".join(front)
        + f"\n- veneer\n---\n{_MARK}\n\n# Adapter for {Path(base).name}\n\n| | |\n|---|---|\n{table}\n\n"
        + "```python\nfrom veneer import PeftModel\n\n"
        + 'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")\n```\n'
    )
