"""``veneer chat``: a conversation in the terminal, with adapters that are switched while it goes on."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, final

import typer

from veneer.cli.generate import adapter_names, with_adapters
from veneer.cli.output import console
from veneer.core.config import field_docs
from veneer.core.errors import UsageError, listed, nearest
from veneer.tasks.sampling import Sampling

if TYPE_CHECKING:
    from veneer.evaluate.conversation import Conversation

_DEFAULT, _HELP = Sampling(), field_docs(Sampling)

COMMANDS = {
    "/use": "NAME   answer with this adapter from now on, or with the base",
    "/system": "TEXT   a system message from now on; without text, none",
    "/reset": "       forget what was said",
    "/help": "       these lines",
    "/quit": "       end, as Ctrl-D does; Ctrl-C stops an answer",
}
"""What may stand at the beginning of a line, with the line of help for each."""


def chat(
    model: Annotated[str, typer.Option(help="The base model: a folder, or a hub name.", show_default=False)],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="A run or adapter folder; repeat it to switch among several."),
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
    """Talk with a model.

    Each line is a message; lines from a file or pipe are read alike. /use NAME goes on with another adapter, /use base
    without any; /system TEXT, /reset, /help and /quit do what they say. Ctrl-C stops an answer, Ctrl-D ends. When the
    model's context is full, the oldest messages are left out, and it says so.

    Example: veneer chat --model ./model --adapter ./pirate --adapter ./poet
    """
    from veneer.evaluate.conversation import BASE, Conversation
    from veneer.tasks.loading import adapter_folder, load_model, tokenizer_for

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    folders = [adapter_folder(path) for path in adapter or []]
    names = adapter_names(adapter or [])
    tokenizer = tokenizer_for(model, folders)
    loaded: Any = load_model(model, dtype=dtype, quantize=quantize)
    if folders:
        loaded = with_adapters(loaded, folders, names)
    talk = Conversation(loaded, tokenizer, sampling, names, system=system)
    _Terminal(talk).run()
    about = {"model": model, "adapters": [BASE, *names], "sampling": sampling}
    return {**about, "system": talk.system, "turns": [asdict(turn) for turn in talk.transcript]}


@final
class _Terminal:
    """Lines in, answers out; notes go to stderr."""

    def __init__(self, talk: Conversation) -> None:
        self.talk = talk
        self.asks = sys.stdin.isatty()

    def run(self) -> None:
        """Line by line, until there is none."""
        self.note(f"Answers come from {self.talk.active}. /help says what else there is.")
        while (line := self.line()) is not None:
            text = line.strip()
            if text == "/quit":
                return
            if not text:
                continue
            try:
                if text.startswith("/"):
                    self.command(*(word.strip() for word in text.partition(" ")[::2]))
                else:
                    self.answer(text)
            except UsageError as error:
                # A message that cannot be answered ends no conversation.
                self.note(str(error))

    def line(self) -> str | None:
        """The next line; None at the end. Ctrl-C takes back what was being typed."""
        while True:
            try:
                if not self.asks:
                    return sys.stdin.readline() or None
                return input(f"{self.talk.active}> ")
            except EOFError:
                console(stderr=True).print()
                return None
            except KeyboardInterrupt:
                if not self.asks:
                    raise
                self.note("/quit or Ctrl-D ends.")

    def command(self, name: str, rest: str) -> None:
        """What a line that begins with a stroke asks for."""
        if name == "/help":
            for command, text in COMMANDS.items():
                self.note(f"{command} {text}")
            self.note(f"adapters: {', '.join(self.talk.names)}")
        elif name == "/use":
            self.talk.use(rest)
            self.note(f"Answers come from {self.talk.active}.")
        elif name == "/system":
            self.talk.tell(rest or None)
            self.note("The system message is changed." if rest else "There is no system message.")
        elif name == "/reset":
            self.talk.reset()
            self.note("What was said is forgotten.")
        else:
            raise UsageError(f"There is no command {name}; expected {listed(COMMANDS)}.{nearest(name, COMMANDS)}")

    def answer(self, text: str) -> None:
        """One message and what is said to it, as it is written."""
        turn = self.talk.say(text, on_text=_show)
        console().print()
        if turn.left_out:
            self.note(f"The context is full: the oldest {turn.left_out} messages were left out.")
        if turn.interrupted:
            self.note("Stopped.")
        elif not turn.stopped:
            self.note(f"Cut at {turn.tokens} tokens.")

    def note(self, text: str) -> None:
        """Something that is no answer."""
        console(stderr=True).print(text, style="dim", markup=False, soft_wrap=True)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
