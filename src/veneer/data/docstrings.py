"""A small real data set that every machine has: function signatures of the Python standard library, and the
first line of their docstrings.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.core.errors import DataError

INSTRUCTION = "Write the first line of the docstring of this Python function."
"""What the model is asked for, as the system message."""

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "pydoc_data"}
)
_WORDS = (4, 20)
_SIGNATURE_LENGTH = 160
# (held out, train): no large module may stand for the whole library.
_PER_MODULE = (2, 8)


@dataclass(frozen=True)
class DocstringPair:
    """One function with what its docstring says first."""

    module: str
    """The module's path in the standard library."""
    signature: str
    """The ``def`` line, under its class when it is a method."""
    summary: str
    """The first line of the docstring."""

    @property
    def row(self) -> dict[str, list[dict[str, str]]]:
        """The pair as a row of training data: a conversation whose last message is to be learned."""
        turns = (("system", INSTRUCTION), ("user", self.signature), ("assistant", self.summary))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def docstring_pairs(
    train: int, held_out: int, *, seed: int = 0, root: Path | None = None
) -> tuple[list[DocstringPair], list[DocstringPair]]:
    """Pairs to train on and pairs to test on, which share no module, no signature and no docstring.

    The same seed gives the same pairs on the same Python.

    Args:
        train: how many pairs to train on.
        held_out: how many pairs to keep for testing.
        seed: orders the modules and the pairs.
        root: the folder to read; by default the standard library of the running Python.

    Raises:
        DataError: the folder has fewer pairs than were asked for.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    modules = sorted(path for path in folder.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(folder).parts))
    random.Random(seed).shuffle(modules)
    parts: tuple[list[DocstringPair], list[DocstringPair]] = ([], [])
    wanted = (held_out, train)
    seen: set[str] = set()
    part = 0
    for path in modules:
        part = next((number for number in (0, 1) if len(parts[number]) < wanted[number]), 2)
        if part == 2:
            break
        # A summary told twice (an overridden method, a copied function) would leak between the parts.
        fresh: dict[str, DocstringPair] = {}
        for pair in _pairs_of(path, str(path.relative_to(folder))):
            if pair.signature not in seen and pair.summary.lower() not in seen:
                seen |= {pair.signature, pair.summary.lower()}
                fresh[pair.signature] = pair
        parts[part].extend(random.Random(seed).sample(list(fresh.values()), min(len(fresh), _PER_MODULE[part])))
    if any(len(found) < count for found, count in zip(parts, wanted, strict=True)):
        raise DataError(
            f"{folder} has {len(parts[1])} training and {len(parts[0])} held-out functions with a usable docstring; "
            f"expected at least {train} and {held_out}."
        )
    for found in parts:
        random.Random(seed).shuffle(found)
    return parts[1][:train], parts[0][:held_out]


def _pairs_of(path: Path, module: str) -> Iterator[DocstringPair]:
    try:
        with warnings.catch_warnings():
            # Old escapes in somebody else's file are not this program's business.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for owner, node in _functions(tree, None):
        summary = _summary(ast.get_docstring(node))
        signature = _signature(owner, node)
        if summary is not None and len(signature) <= _SIGNATURE_LENGTH and not node.name.startswith("__"):
            yield DocstringPair(module, signature, summary)


def _functions(node: ast.AST, owner: str | None) -> Iterator[tuple[str | None, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions of a module and methods of its classes; functions inside functions are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, child.name)
        elif isinstance(child, ast.If | ast.Try):
            yield from _functions(child, owner)


def _signature(owner: str | None, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{keyword} {node.name}({ast.unparse(node.args)}){returns}:"
    return line if owner is None else f"class {owner}:\n{textwrap.indent(line, '    ')}"


def _summary(docstring: str | None) -> str | None:
    """The first line when it is a sentence of its own, else None."""
    if not docstring:
        return None
    first, _, rest = docstring.strip().partition("\n")
    line = first.strip()
    whole = line.endswith(".") or not rest.split("\n", 1)[0].strip()
    few, many = _WORDS
    plain = line.isascii() and line[:1].isupper() and "(" not in line.split(" ", 1)[0]
    return line if whole and plain and few <= len(line.split()) <= many else None
