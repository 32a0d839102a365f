from __future__ import annotations

import io

from rich.console import Console

from veneer.report.preview import preview
from veneer.tasks.task import Piece


def shown(*pieces: Piece, colour: bool = False) -> str:
    stream = io.StringIO()
    colours = {"color_system": "standard" if colour else None, "no_color": not colour}
    console = Console(file=stream, width=80, force_terminal=colour, **colours)
    console.print(preview(pieces, origin="train.jsonl:3"))
    return stream.getvalue()


def test_trained_text_is_coloured_and_bracketed() -> None:
    pieces = (Piece("what is it? ", False), Piece("a stone", True))
    assert "what is it? ⟦a stone⟧" in shown(*pieces)
    assert "one example, train.jsonl:3" in shown(*pieces)
    assert "\x1b[1;32ma stone" in shown(*pieces, colour=True)


def test_text_is_shown_as_it_is() -> None:
    text = shown(Piece("[bold]not markup[/] \x1b[2J\x07", False), Piece("x", True))
    assert "[bold]not markup[/] \\x1b[2J\\x07" in text
    assert "\x1b" not in text


def test_the_middle_of_a_long_text_is_left_out() -> None:
    text = shown(Piece("a" * 5000 + "b" * 5000, True))
    assert "8,500" in text
    assert text.count("a") < 1000
