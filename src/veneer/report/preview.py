"""One training example as the model sees it, the trained tokens in colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from veneer.report.tables import side_by_side
from veneer.tasks.task import Piece
from veneer.train.samples import Sample

TRAINED = "bold green"
CONTEXT = "dim"
_MOST = 1500
"""Characters of one stretch that are shown; of a longer one the middle is left out."""


def preview(pieces: Sequence[Piece], *, origin: str) -> Panel:
    """A panel with the text of an example; without colours, trained text stands between ⟦ and ⟧.

    Args:
        pieces: the example in stretches that are trained or not.
        origin: the row that it comes from.
    """
    text = Text(overflow="fold")
    for piece in pieces:
        if piece.trained:
            text.append("⟦", style=CONTEXT)
            text.append(_shown(piece.text), style=TRAINED)
            text.append("⟧", style=CONTEXT)
        else:
            text.append(_shown(piece.text), style=CONTEXT)
    legend = Text.assemble(("trained", TRAINED), ", ", ("only read", CONTEXT))
    return Panel(Group(text), title=Text(f"one example, {origin}"), subtitle=legend, title_align="left", padding=(0, 1))


def samples(answers: Sequence[Sample]) -> Group:
    """Prompts with what the model wrote before training, what it writes now, and the right answer."""
    drawn = []
    for one in answers:
        columns = {"before": one.before, "now": one.now}
        if one.reference is not None:
            columns["expected"] = one.reference
        drawn.append(side_by_side({name: _shown(text) for name, text in columns.items()}, prompt=_shown(one.asked)))
    return Group(*drawn)


def _shown(text: str) -> str:
    """Text without control characters, which a terminal would obey, and without its middle when it is long."""
    if len(text) > _MOST:
        half = _MOST // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return "".join(char if char.isprintable() or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)
