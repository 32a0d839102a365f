"""Docstring pairs: read from source, the same for the same seed, and nothing shared between the two parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.core.errors import DataError
from veneer.data.docstrings import INSTRUCTION, DocstringPair, docstring_pairs


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small modules, one of them a copy, and files that must be left out."""
    root = tmp_path_factory.mktemp("library")
    for number in range(10):
        (root / f"module_{number}.py").write_text(
            f'def work_{number}(a, b=1) -> int:\n    """Return the sum of a and b, number {number}."""\n'
            f"class Thing:\n    def method_{number}(self):\n"
            f'        """Do the thing of number {number}.\n\n        More."""\n'
            'def __init__(self):\n    """This one has a name that is left out."""\n',
            encoding="utf-8",
        )
    (root / "copy.py").write_text((root / "module_0.py").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "test").mkdir()
    (root / "test" / "test_it.py").write_text('def t():\n    """This is in a test folder."""\n', encoding="utf-8")
    (root / "broken.py").write_text("def (", encoding="utf-8")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    return root


def test_pairs_of_a_module(library: Path) -> None:
    train, held_out = docstring_pairs(12, 4, root=library)
    pairs = {pair.signature: pair for pair in train + held_out}
    some = next(number for number in range(10) if f"def work_{number}(a, b=1) -> int:" in pairs)
    assert pairs[f"def work_{some}(a, b=1) -> int:"].summary == f"Return the sum of a and b, number {some}."
    assert any(signature.startswith("class Thing:\n    def method_") for signature in pairs)
    assert not any("__init__" in signature or "def t(" in signature for signature in pairs)


def test_the_seed_decides(library: Path) -> None:
    assert docstring_pairs(12, 4, seed=3, root=library) == docstring_pairs(12, 4, seed=3, root=library)
    assert docstring_pairs(12, 4, seed=3, root=library) != docstring_pairs(12, 4, seed=4, root=library)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_leaks(library: Path, seed: int) -> None:
    train, held_out = docstring_pairs(12, 4, seed=seed, root=library)
    assert (len(train), len(held_out)) == (12, 4)
    for of in (lambda pair: pair.module, lambda pair: pair.signature, lambda pair: pair.summary):
        assert not {of(pair) for pair in train} & {of(pair) for pair in held_out}


def test_too_few(library: Path) -> None:
    with pytest.raises(DataError, match="at least 500 and 4"):
        docstring_pairs(500, 4, root=library)


def test_the_standard_library_of_this_python() -> None:
    train, held_out = docstring_pairs(40, 8)
    assert (len(train), len(held_out)) == (40, 8)
    assert len({pair.module for pair in held_out}) >= 4


def test_a_row_is_a_conversation() -> None:
    row = DocstringPair("m.py", "def f():", "Do it now, please.").row
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert [message["content"] for message in row["messages"]] == [INSTRUCTION, "def f():", "Do it now, please."]
