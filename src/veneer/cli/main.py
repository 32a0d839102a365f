"""The command line: its verbs, their exit codes, and one sentence for every error.

Exit codes: 0 done, 1 a failure, 2 a mistake in the command or its configuration, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TextIO

import typer

from veneer.cli.chat import chat
from veneer.cli.convert import convert
from veneer.cli.data import data
from veneer.cli.demo import demo
from veneer.cli.env import env
from veneer.cli.eval import evaluate
from veneer.cli.export import export
from veneer.cli.extract import extract
from veneer.cli.flags import show_flags
from veneer.cli.generate import generate
from veneer.cli.inspect import inspect_model
from veneer.cli.merge import merge
from veneer.cli.output import Outcome, console, for_humans, quiet_libraries, write_document
from veneer.cli.predict import predict
from veneer.cli.resize import resize
from veneer.cli.runs import runs
from veneer.cli.train import train
from veneer.core.errors import VeneerError, nearest

VERBS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "train": train,
    "runs": runs,
    "data": data,
    "generate": generate,
    "chat": chat,
    "eval": evaluate,
    "predict": predict,
    "merge": merge,
    "extract": extract,
    "resize": resize,
    "convert": convert,
    "export": export,
    "inspect": inspect_model,
    "env": env,
}
"""Every verb with its command. A command prints for humans and returns what ``--json`` writes,
or an ``Outcome`` with an exit code beside it."""

DEBUG = "VENEER_DEBUG"
"""The environment variable that asks for the traceback of an error."""

app = typer.Typer(
    name="veneer",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# The parse errors of click, which typer carries inside itself since 0.2x and imports before.
_ParseError: type[Exception] = typer.BadParameter.__mro__[2]


def run() -> None:
    """The entry point of the ``veneer`` command."""
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: what stands after ``veneer``.

    Returns:
        The exit code.
    """
    as_json = "--json" in arguments
    try:
        with for_humans(as_json=as_json) as document:
            code = _run(arguments, document if as_json else None)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        # The reader has gone; without this, Python complains once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def _run(arguments: Sequence[str], document: TextIO | None) -> int:
    """Run one command; its result or its error goes into the document, if there is one."""
    try:
        result = app(args=list(arguments), prog_name="veneer", standalone_mode=False)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return _failed("Interrupted.", 130, document)
    except VeneerError as error:
        return _failed(str(error), error.exit_code, document, error)
    except _ParseError as error:
        return _failed(_parse_message(error), 2, document, error)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return _failed(f"Unexpected error, {text} (set {DEBUG}=1 to see where).", 1, document, error)
    if isinstance(result, int):
        said = {130: "Interrupted.", 143: "Terminated."}.get(result)
        return result if said is None else _failed(said, result, document)
    outcome = result if isinstance(result, Outcome) else Outcome(result)
    if document is not None and outcome.result is not None:
        write_document(document, outcome.result)
    return outcome.code


def _failed(message: str, code: int, document: TextIO | None, error: BaseException | None = None) -> int:
    if error is not None and os.environ.get(DEBUG):
        traceback.print_exception(error)
    console(stderr=True).print(f"[bold red]error:[/] {_literal(message)}", soft_wrap=True)
    if document is not None:
        kind = type(error).__name__ if error is not None else "Interrupted"
        write_document(document, {"error": {"type": kind, "message": message, "exit_code": code}})
    return code


def _literal(message: str) -> str:
    return message.replace("[", "\\[")


def _parse_message(error: Any) -> str:
    """A parse error in one sentence, with the nearest flag and where to look."""
    possible = getattr(error, "possibilities", None)
    text = (error.message if possible is not None else error.format_message()).rstrip(".?")
    end = "?" if "Did you mean" in text else "."
    context = error.ctx.command_path if getattr(error, "ctx", None) is not None else "veneer"
    close = nearest(error.option_name, possible, most=1) if possible else ""
    return f"{text}{end}{close} See {context} -h."


def _with_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json``, which the main program acts on, to a command."""

    @functools.wraps(command)
    def verb(**given: Any) -> Any:
        del given["json"]
        return command(**given)

    annotation = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, all else on stderr.")]
    added = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
    show_flags(verb, command, [added])
    return verb


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"veneer {version('veneer')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Adapt a frozen model with a thin trainable layer: train, evaluate, merge and generate on small machines."""


def _register() -> None:
    for name, command in VERBS.items():
        text, _, example = inspect.cleandoc(command.__doc__ or "").partition("Example:")
        # The help breaks lines by itself; those of the source would stand in the way.
        paragraphs = [" ".join(part.split()) for part in text.strip().split("\n\n")]
        app.command(
            name, help="\n\n".join(paragraphs), epilog=f"[bold]Example:[/] {_literal(' '.join(example.split()))}"
        )(_with_json(command))


_register()
