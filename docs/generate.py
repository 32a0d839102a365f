"""Write the reference pages from the code: the command line from its commands, the configs from their fields.

python docs/generate.py            # write docs/reference/*.md and the table in README.md
python docs/generate.py --check    # fail when a page is not what the code says
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any, Literal, Union

ROOT = Path(__file__).resolve().parent.parent
HEADER = "<!-- Written by docs/generate.py; change the code it is made from, then run `make docs`. -->\n\n"


def main() -> int:
    """Write the pages, or compare them with ``--check``; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is out of date")
    check = parser.parse_args().check
    stale = False
    for name, made in PAGES.items():
        path = ROOT / name
        wanted = made()
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found == wanted:
            continue
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted, encoding="utf-8")
            print(f"wrote {name}")
            continue
        stale = True
        difference = difflib.unified_diff(found.splitlines(), wanted.splitlines(), name, "from the code", lineterm="")
        print("\n".join(list(difference)[:40]))
        print(f"{name} is out of date; run `make docs`.", file=sys.stderr)
    return int(stale)


# The command line


def cli_page() -> str:
    """Every verb with its flags."""
    import typer

    from veneer.cli.main import app

    root: Any = typer.main.get_command(app)
    parts = ["# The command line", plain(root.help), "Every verb takes `-h` for help."]
    parts.append("Exit codes: 0 done, 1 a failure, 2 a mistake in the command or its configuration, 130 interrupted.")
    parts.append(table(("Verb", "What it does"), [(f"[`{n}`](#{n})", first_line(c)) for n, c in root.commands.items()]))
    for name, command in root.commands.items():
        parts += [f"## {name}", paragraphs(command.help)]
        example = plain(command.epilog).removeprefix("Example:").strip()
        if example:
            parts.append(f"```sh\n{example}\n```")
        rows = [flag(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        parts.append(table(("Argument", "Default", "Meaning"), rows))
    return "\n\n".join(part for part in parts if part)


def first_line(command: Any) -> str:
    """The sentence that sums a command up."""
    return paragraphs(command.help).split("\n\n")[0]


def flag(parameter: Any) -> tuple[str, str, str]:
    """How a parameter is given, its default, and what it means."""
    meaning, _, shown = paragraphs(parameter.help).removesuffix("]").partition(" [default: ")
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`", "required", meaning
    value = parameter.default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    names = " / ".join([*parameter.opts, *parameter.secondary_opts])
    takes = "" if parameter.is_flag else f" {parameter.metavar or ('NUMBER' if is_number else 'TEXT')}"
    if parameter.required:
        shown = "required"
    elif is_number or (isinstance(value, str | PurePath) and str(value)):
        shown = str(value)
    return f"`{names}{takes}`", f"`{shown}`" if shown and shown != "required" else shown, meaning


# The configs


def config_page() -> str:
    """Every field of every config."""
    from veneer.core.config import LoraConfig, field_docs
    from veneer.core.task_type import TaskType
    from veneer.train.config import RunConfig
    from veneer.train.families import adapter_fields

    docs = field_docs(LoraConfig)
    hints = typing.get_type_hints(LoraConfig)
    lora = [(f.name, hints[f.name], default(f), docs[f.name]) for f in dataclasses.fields(LoraConfig)]
    run = [
        (name, field.annotation, "required" if field.is_required() else code(field.default), field.description or "")
        for name, field in RunConfig.model_fields.items()
        if name not in adapter_fields()
    ]
    columns = ("Field", "Type", "Default", "Meaning")
    refused = [
        (f"`{name}`", code(value) or "`None`", LoraConfig.reasons[name][:1].upper() + LoraConfig.reasons[name][1:])
        for name, value in sorted(LoraConfig.not_built.items())
    ]
    return "\n\n".join(
        [
            "# Configs",
            "An unknown field fails and names the nearest one.",
            "## LoraConfig",
            'Names, defaults and meaning are PEFT\'s. In Python: `LoraConfig(r=16, target_modules="all-linear")`.',
            table(columns, [field_row(*row) for row in lora]),
            "### PEFT fields that are accepted at their default only",
            "Any other value is refused, so that no option is ever ignored.",
            table(("Field", "Accepted value", "Why, and what to do"), refused),
            *family_sections(),
            "## TaskType",
            table(
                ("Task", "Name in PEFT's files", "The model's head is trained and saved"),
                [(f"`{t.value}`", code(t.peft_name), "yes" if t.has_head else "no") for t in TaskType],
            ),
            "## A run",
            "The fields of `run.yaml`, which `veneer train --config` reads and every run folder holds. "
            "The fields that describe an adapter stand beside them: `family`, and those of its config ("
            + ", ".join(f"`{n}`" for n in list(adapter_fields())[1:])
            + ").",
            table(columns, [field_row(*row) for row in run]),
        ]
    )


def family_sections() -> list[str]:
    """The fields of the other families' configs."""
    from veneer.core.config import field_docs
    from veneer.train.families import FAMILIES

    parts = []
    for config in list(FAMILIES.values())[1:]:
        docs, hints = field_docs(config), typing.get_type_hints(config)
        rows = [field_row(f.name, hints[f.name], default(f), docs[f.name]) for f in dataclasses.fields(config)]
        parts += [
            f"## {config.__name__}",
            first_paragraph(config),
            table(("Field", "Type", "Default", "Meaning"), rows),
        ]
    return parts


def first_paragraph(config: type) -> str:
    """What a config is for."""
    return " ".join((config.__doc__ or "").split("\n\n")[0].split())


def field_row(name: str, hint: Any, shown: str, meaning: str) -> tuple[str, ...]:
    """One line of a table of fields."""
    return f"`{name}`", f"`{kind(hint)}`", shown, " ".join(meaning.split())


def default(field: Any) -> str:
    """A dataclass field's default."""
    if field.default_factory is not dataclasses.MISSING:
        return code(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else code(field.default)


def code(value: Any) -> str:
    """A value as Python shows it; nothing for None."""
    return "" if value is None else f"`{value!r}`"


def kind(hint: Any) -> str:
    """A type in few words, the same on every Python."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(part) for part in inner if part is not type(None)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is not None:
        return f"{origin.__name__} of {' to '.join(kind(part) for part in inner)}"
    return "any" if hint is Any else hint.__name__


# Text


def plain(text: str | None) -> str:
    """Help text without rich's markup."""
    from rich.text import Text

    return Text.from_markup(text or "").plain.strip()


def paragraphs(text: str | None) -> str:
    """Help text with the line breaks of its source taken out."""
    return "\n\n".join(" ".join(part.split()) for part in plain(text).split("\n\n"))


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [tuple(columns)]
    lines += [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    lines.insert(1, tuple("---" for _ in lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# What goes onto what


def variants_table(*, with_reasons: bool) -> str:
    """Which variant can be on which base, found by adapting the modules of the contract suite."""
    sys.path.insert(0, str(ROOT))
    from tests.contract.table import rows

    headings, cells, reasons = rows()
    if not with_reasons:
        return table(headings, [[cell.partition(" (")[0] for cell in row] for row in cells])
    listed = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return f"{table(headings, cells)}\n\nThe numbers stand for what veneer says:\n\n{listed}"


def variants_page() -> str:
    """Every variant on every base."""
    return "\n\n".join(
        [
            "# What goes onto what",
            "Every variant was put onto every kind of module to write this table. A combination that is refused is "
            "refused before the model is touched.",
            variants_table(with_reasons=True),
        ]
    )


def readme() -> str:
    """The README with its generated part as it should be."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        return text
    return f"{before}{start}\n\n{variants_table(with_reasons=False)}\n\n{end}{after}"


START, END = "<!-- variants: written by docs/generate.py -->", "<!-- end of variants -->"
PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/cli.md": lambda: page(cli_page),
    "docs/reference/config.md": lambda: page(config_page),
    "docs/reference/variants.md": lambda: page(variants_page),
    "README.md": readme,
}


def page(made: Callable[[], str]) -> str:
    """A reference page whole."""
    return HEADER + made().rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
