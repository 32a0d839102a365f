"""``veneer generate``: one model's answer as it is written, or several adapters' answers side by side."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.output import console
from veneer.core.config import field_docs
from veneer.core.errors import UsageError
from veneer.tasks.sampling import Sampling

if TYPE_CHECKING:
    from veneer.adapters.model import PeftModel

_DEFAULT, _HELP = Sampling(), field_docs(Sampling)


def generate(
    model: Annotated[str, typer.Option(help="The base model: a folder, or a hub name.", show_default=False)],
    prompt: Annotated[str, typer.Option(help='What to answer; "-" reads it from stdin.', show_default=False)],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="A run or adapter folder; repeat it to compare several.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help=_HELP["max_new_tokens"])] = _DEFAULT.max_new_tokens,
    temperature: Annotated[float, typer.Option(help=_HELP["temperature"])] = _DEFAULT.temperature,
    top_p: Annotated[float, typer.Option(help=_HELP["top_p"])] = _DEFAULT.top_p,
    seed: Annotated[int, typer.Option(help=_HELP["seed"])] = _DEFAULT.seed,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the saved one.")] = "float32",
    quantize: Annotated[
        str | None, typer.Option(metavar="nf4|fp4|int8", help="Store the base's linear layers in 4 or 8 bits.")
    ] = None,
) -> dict[str, Any]:
    """Answer a prompt.

    The tokenizer's chat template is used when it has one. With several adapters, all are loaded onto one copy of
    the base, and their answers stand side by side after the base's own.

    Example: veneer generate --model ./model --adapter ./run --prompt "Say hello."
    """
    from veneer.evaluate.generation import BASE, answer, answers, encode
    from veneer.report.tables import side_by_side
    from veneer.tasks.loading import adapter_folder, load_model, tokenizer_for

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    folders = [adapter_folder(path) for path in adapter or []]
    names = adapter_names(adapter or [])
    text = sys.stdin.read() if prompt == "-" else prompt
    tokenizer = tokenizer_for(model, folders)
    encoded = encode(tokenizer, text, system=system)
    loaded: Any = load_model(model, dtype=dtype, quantize=quantize)
    if folders:
        loaded = with_adapters(loaded, folders, names)
    screen = console()
    if len(folders) > 1:
        found = answers(loaded, tokenizer, encoded, sampling, names)
        screen.print(side_by_side({a.adapter: a.text for a in found}))
    else:
        name = names[0] if names else BASE
        try:
            found = [answer(loaded, tokenizer, encoded, sampling, name=name, on_text=_show)]
        finally:
            # An interrupt must not leave the prompt behind half an answer.
            screen.print()
    for one in found:
        ending = "" if one.stopped else f", cut at --max-new-tokens {max_new_tokens}"
        speed = one.tokens / max(one.seconds, 1e-9)
        note = f"{one.adapter}: {one.tokens} tokens, {speed:.1f} a second{ending}"
        console(stderr=True).print(note, style="dim", markup=False)
    return {"model": model, "prompt": text, "system": system, "sampling": sampling, "answers": found}


def adapter_names(paths: list[str]) -> list[str]:
    """A short name for each adapter folder: its own, or as much of the path as tells them apart.

    Raises:
        UsageError: the same folder twice.
    """
    parts = [Path(path).expanduser().resolve().parts for path in paths]
    if len(set(parts)) != len(parts):
        raise UsageError(f"The same adapter is given twice: {', '.join(paths)}.")
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = [_usable(re.sub(r"[^\w-]", "_", "-".join(part[-length:]))) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"These adapters cannot be told apart by their names: {', '.join(paths)}.")


def _usable(name: str) -> str:
    """The name, with a word before it where it could not name an adapter or would read as the base model."""
    from veneer.adapters.inject import check_name

    try:
        check_name(name)
    except UsageError:
        return f"run-{name}"
    return f"run-{name}" if name == "base" else name


def with_adapters(model: Any, folders: list[Path], names: list[str]) -> PeftModel:
    """All adapters on one copy of the base, the first active, none trainable."""
    from veneer.adapters.model import PeftModel

    adapted = PeftModel.from_pretrained(model, folders[0], names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        adapted.load_adapter(folder, name)
    return adapted


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
