"""The shape of the source: small files, small functions, layers, and a new variant that is one new file."""

from __future__ import annotations

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "veneer"
FILES = {str(path.relative_to(SOURCE)): path.read_text() for path in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(text) for name, text in FILES.items()}

LONG_FILES = {
    "adapters/model.py": "PEFT's public names in one class: its docstrings are the reference page",
}
LONG_FUNCTIONS: dict[str, str] = {}
OPEN_CLASSES: dict[str, str] = {}
"""Concrete classes that others in the source derive from, each with its reason."""

MOST_LINES, MEDIAN_LINES, FUNCTION_LINES = 400, 200, 60


def functions() -> Iterator[tuple[str, int]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}:{node.name}", node.end_lineno - node.lineno + 1


def test_files_are_short() -> None:
    lengths = {name: text.count("\n") for name, text in FILES.items()}
    long = {name for name, length in lengths.items() if length > MOST_LINES}
    assert long == LONG_FILES.keys()
    assert statistics.median(length for length in lengths.values() if length) < MEDIAN_LINES


def test_functions_are_short() -> None:
    assert {name for name, length in functions() if length >= FUNCTION_LINES} == LONG_FUNCTIONS.keys()


def test_nothing_is_called_utils() -> None:
    parts = {part for name in FILES for part in Path(name).with_suffix("").parts}
    assert not {part for part in parts if re.fullmatch(r"_?(utils?|helpers?|misc|common)", part)}


def _name(node: ast.expr) -> str:
    """The last word of ``a.b.C``, of ``C[T]`` and of ``C(...)``."""
    if isinstance(node, ast.Subscript | ast.Call):
        return _name(node.value if isinstance(node, ast.Subscript) else node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


CLASSES = {
    node.name: (name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
}


def is_abstract(node: ast.ClassDef) -> bool:
    decorators = {_name(d) for item in node.body if isinstance(item, ast.FunctionDef) for d in item.decorator_list}
    said_so = (ast.get_docstring(node) or "").split("\n\n")[0].endswith("Abstract.")
    return "abstractmethod" in decorators or said_so


def is_error(node: ast.ClassDef) -> bool:
    bases = {_name(base) for base in node.bases}
    return "Exception" in bases or any(base in CLASSES and is_error(CLASSES[base][1]) for base in bases)


def test_classes_are_abstract_or_final() -> None:
    """Errors form a tree, so that a caller can catch as much as it wants; nothing else that is concrete is derived."""
    derived = {_name(base) for _, node in CLASSES.values() for base in node.bases} & CLASSES.keys()
    concrete = {name for name in derived if not is_abstract(CLASSES[name][1]) and not is_error(CLASSES[name][1])}
    assert concrete == OPEN_CLASSES.keys()
    # Nobody derives from a class that is marked as final either.
    assert not {name for name in derived if "final" in {_name(d) for d in CLASSES[name][1].decorator_list}}


def test_abstract_classes_are_never_instantiated() -> None:
    abstract = {name for name, (_, node) in CLASSES.items() if is_abstract(node)}
    assert {"AbstractBase", "AbstractVariant", "AbstractInit", "PeftConfig", "LowRankConfig"} <= abstract
    calls = {(name, _name(n.func)) for name, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not {(name, called) for name, called in calls if called in abstract}


def test_imports_point_down() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tests_mirror_the_source() -> None:
    """A folder of tests is a room of the source, or says here what else it is."""
    elsewhere = {"contract", "benchmarks", "docs", "recipes", "examples"}
    folders = {
        path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith(("_", "."))
    }
    assert folders - elsewhere <= {path.name for path in SOURCE.iterdir() if path.is_dir()}


VARIANT = '''
"""Half of LoRA's update."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor

from veneer.core.base import AbstractBase
from veneer.core.init import Start
from veneer.core.config import LowRankConfig, PeftConfig, strict
from veneer.core.variant import AbstractVariant, ParameterSpec, low_rank_forward


@final
@strict
@dataclass(kw_only=True)
class HalvedConfig(LowRankConfig):
    """Its own config."""

    peft_type: str | None = "HALVED"


@final
class Variant(AbstractVariant):
    config_class: ClassVar[type[PeftConfig]] = HalvedConfig
    options: ClassVar[Mapping[str, Any]] = {}

    def parameters(self, base, r, config):
        shapes = base.factor_shapes(r)
        return {name: ParameterSpec(shape) for name, shape in zip(base.factor_names, shapes, strict=True)}

    def shared(self, shapes, config):
        return {}

    def scaling(self, r, lora_alpha, config):
        return lora_alpha / r / 2

    def start(self, base, p, init, *, scaling, config, evidence):
        A, B = (p[name] for name in base.factor_names)
        return init.fill(Start(base, A, B, None, scaling, config, evidence))

    def forward(self, base, p, x, y, *, scaling, dropout):
        A, B = (p[name] for name in base.factor_names)
        return low_rank_forward(base, A, B, x, y, scaling=scaling, dropout=dropout)

    def update(self, base, p, W_OI, *, scaling):
        A, B = (p[name] for name in base.factor_names)
        return base.delta(A, B) * scaling

    def merged_bias(self, base, p, bias, *, scaling):
        return bias

    def in_file(self, key, tensor, path, config):
        return tensor
'''


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The source and the contract in a folder of their own."""
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE, tmp_path / "src" / "veneer", ignore=leave)
    shutil.copytree(ROOT / "tests" / "contract", tmp_path / "tests" / "contract", ignore=leave)
    for name in ("conftest.py", "models.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    return tmp_path


def contract(folder: Path, only: str) -> subprocess.CompletedProcess[str]:
    # No worker of this run is one of that run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(folder / "src")
    command = [sys.executable, "-m", "pytest", "tests/contract", "-k", only, "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "--import-mode=importlib", "--rootdir", str(folder), "-rN"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_new_variant_is_one_file(copied: Path) -> None:
    """The contract finds it by its file name and runs it on every base and from every start."""
    (copied / "src" / "veneer" / "variants" / "halved.py").write_text(VARIANT)
    done = contract(copied, "halved or test_each")
    assert done.returncode == 0, done.stdout[-3000:]
    ran = int(re.search(r"(\d+) passed", done.stdout)[1])
    whole = subprocess.run(
        [
            sys.executable,
            "-c",
            "from veneer.core import registry as r; print(*[len(r.names(x)) for x in ('bases', 'inits')])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    bases, inits = map(int, whole.stdout.split())
    # Most starts on most bases, in three tests each.
    assert ran > bases * inits


def test_a_new_base_without_an_example_says_what_to_add(copied: Path) -> None:
    linear = (copied / "src" / "veneer" / "bases" / "linear.py").read_text()
    (copied / "src" / "veneer" / "bases" / "brand_new.py").write_text(linear)
    done = contract(copied, "brand_new and dropout")
    assert done.returncode == 1
    assert "bases/brand_new.py is new: give it a module and an input in CASES of" in done.stdout
