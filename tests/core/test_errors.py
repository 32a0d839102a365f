"""The two phrases that error messages are made with."""

from __future__ import annotations

from veneer.core.errors import listed, nearest


def test_nearest() -> None:
    assert nearest("q_porj", ["q_proj", "v_proj"], most=1) == " Did you mean 'q_proj'?"
    assert nearest("q_porj", ["q_proj", "q_prox"]) == " Did you mean 'q_proj' or 'q_prox'?"
    assert nearest("abc", ["xyz"]) == ""
    assert nearest("abc", []) == ""


def test_listed() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed("abcd", most=2) == "a, b and 2 more"
    assert listed([]) == ""
