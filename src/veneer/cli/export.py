"""``veneer export``: whether vLLM takes an adapter, or the adapter as a GGUF file for llama.cpp."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.output import Outcome, console
from veneer.core.errors import UsageError, nearest

CHECKS = ("vllm",)
FORMATS = ("gguf",)


def export(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A run or adapter folder.")],
    check: Annotated[
        str | None, typer.Option(metavar="vllm", help="Say whether this server would load the adapter.")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="gguf", help="Write the adapter in this format.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model; only its config is read.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The file to write.")] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option(help="The server's --max-lora-rank; by default the least that fits.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that stands at the output.")] = False,
) -> Outcome:
    """Check an adapter for vLLM, or write it as a GGUF file for llama.cpp.

    With --check, nothing is written: every reason why vLLM would refuse the adapter or scale it wrongly stands on a
    line with what to do about it, and the exit code is 1 if there is one.

    Example: veneer export ./run --to gguf --model ./model --output adapter.gguf
    """
    from veneer.tasks.loading import adapter_folder

    if (check is None) == (to is None):
        raise UsageError("Expected one of --check and --to: --check vllm, or --to gguf.")
    for flag, value, known in (("--check", check, CHECKS), ("--to", to, FORMATS)):
        if value is not None and value not in known:
            raise UsageError(f"{flag} is {value!r}; expected {', '.join(known)}.{nearest(value, known)}")
    folder = adapter_folder(adapter)
    if check is not None:
        if output is not None or force:
            raise UsageError("--output and --force belong to --to; --check writes nothing.")
        return _vllm(folder, model, max_lora_rank)
    if max_lora_rank is not None:
        raise UsageError("--max-lora-rank belongs to --check vllm.")
    if model is None or output is None:
        raise UsageError(f"--to {to} needs --model, the base model, and --output, the file to write.")
    return Outcome(_gguf(folder, model, output, force=force))


def _vllm(folder: Path, model: str | None, max_lora_rank: int | None) -> Outcome:
    from veneer.adapters.export import check_vllm

    base, model_type = _base(folder, model)
    found = check_vllm(folder, max_lora_rank=max_lora_rank, model_type=model_type)
    screen = console()
    for finding in found.findings:
        mark = "[bold red]problem:[/]" if finding.blocks else "[yellow]note:[/]"
        text = f"{finding.what}; {finding.do}.".replace("[", "\\[")
        screen.print(f"{mark} {text}", soft_wrap=True)
    rank = max_lora_rank or found.max_lora_rank
    command = f"vllm serve {shlex.quote(base or 'BASE')} --enable-lora --max-lora-rank {rank}"
    command += f" --lora-modules {shlex.quote(f'adapter={folder}')}"
    if found.takes_it:
        screen.print(f"vLLM takes it:\n  {command}", soft_wrap=True, markup=False)
    document = {
        "adapter": str(folder),
        "check": "vllm",
        "takes_it": found.takes_it,
        "max_lora_rank": found.max_lora_rank,
        "command": command if found.takes_it else None,
        "findings": found.findings,
    }
    return Outcome(document, 0 if found.takes_it else 1)


def _base(folder: Path, model: str | None) -> tuple[str | None, str | None]:
    """The base model's name and type: as given, else what the adapter says, if it can be found."""
    from veneer.core.hub import CONFIG_NAME
    from veneer.core.peft_config import read_json
    from veneer.tasks.loading import load_config

    if model is not None:
        return model, load_config(model).model_type
    named = read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
    if not isinstance(named, str):
        return None, None
    try:
        return named, load_config(named).model_type
    except UsageError:
        return named, None


def _gguf(folder: Path, model: str, output: Path, *, force: bool) -> dict[str, Any]:
    from veneer.adapters import files
    from veneer.adapters.gguf import write_gguf
    from veneer.report.tables import facts, megabytes
    from veneer.tasks.loading import load_config

    if output.is_dir():
        raise UsageError(f"The output {str(output)!r} is a folder; expected the name of a file, such as adapter.gguf.")
    if output.exists() and not force:
        raise UsageError(f"The output {str(output)!r} exists already; give another name, or --force to replace it.")
    report = write_gguf(files.read(folder), load_config(model).to_dict(), output)
    shown = {
        "architecture": report.architecture,
        "alpha": f"{report.alpha:g}",
        "layers": len(report.tensors),
        "layers with a factor of their own in B": len(report.rescaled),
        "size": megabytes(report.bytes),
        "written to": str(output),
    }
    screen = console()
    screen.print(facts(shown))
    screen.print(f"llama-cli -m BASE.gguf --lora {shlex.quote(str(output))}", soft_wrap=True, markup=False)
    return {"adapter": str(folder), "to": "gguf", "output": output, **vars(report)}
