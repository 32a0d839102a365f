"""A conversation with a model: what was said so far goes into every answer, whichever adapter gives it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from veneer.core.errors import UsageError, listed, nearest
from veneer.evaluate.generation import BASE, answer, encode_messages
from veneer.tasks.limits import longest_input
from veneer.tasks.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BASE", "Conversation", "Turn"]


@final
@dataclass(frozen=True)
class Turn:
    """A message and what was said to it."""

    adapter: str
    """The adapter that answered, or "base"."""
    system: str | None
    """The system message at the time."""
    message: str
    text: str
    """The answer without special tokens; of one that was stopped, what there was."""
    tokens: int
    """How many tokens were written, the end token included."""
    seconds: float
    """How long it took."""
    stopped: bool
    """Whether the model ended by itself."""
    interrupted: bool
    """Whether Ctrl-C ended it."""
    left_out: int
    """How many of the oldest messages did not fit into the model's context."""


@final
class Conversation:
    """What was said, and who answers.

    Args:
        model: a transformers model with a language head; with adapters, adapted.
        tokenizer: its tokenizer.
        sampling: how tokens are chosen.
        names: of the model's adapters; the first answers first, else the base.
        system: the system message.

    Raises:
        UsageError: the tokenizer has no chat template, so that nothing says how a conversation is written.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        names: Sequence[str],
        *,
        system: str | None = None,
    ) -> None:
        if tokenizer.chat_template is None:
            raise UsageError(
                "This tokenizer has no chat template, so nothing says how a conversation is written for its model; "
                "give an adapter or a model that has one, or ask once with veneer generate."
            )
        self.model, self.tokenizer, self.sampling, self.system = model, tokenizer, sampling, system
        self.names = [BASE, *names]
        self.active = names[0] if names else BASE
        self.messages: list[dict[str, str]] = []
        self.transcript: list[Turn] = []

    def use(self, name: str) -> None:
        """Let another adapter answer from now on, or the base.

        Raises:
            UsageError: there is none of that name.
        """
        if name not in self.names:
            raise UsageError(f"There is no adapter {name!r}; expected {listed(self.names)}.{nearest(name, self.names)}")
        self.active = name

    def tell(self, system: str | None) -> None:
        """Change the system message, of the whole conversation; None leaves it out."""
        self.system = system

    def reset(self) -> None:
        """Forget what was said; the transcript keeps it."""
        self.messages = []

    def say(self, message: str, on_text: Callable[[str], object] = lambda text: None) -> Turn:
        """A message and the answer to it. Ctrl-C ends the answer, and what there is of it counts as said.

        Args:
            message: what the user says.
            on_text: called with each new piece of the answer.

        Raises:
            UsageError: the message alone is more than the model's context holds, or the template refuses it; it is not
                said then.
        """
        asked = [*self.messages, {"role": "user", "content": message}]
        encoded, sampling, left_out = self._fitting(asked)
        heard = _Heard(on_text)
        began = time.perf_counter()
        try:
            with self._answering():
                found = answer(self.model, self.tokenizer, encoded, sampling, name=self.active, on_text=heard)
            text, tokens, stopped, interrupted = found.text, found.tokens, found.stopped, False
        except KeyboardInterrupt:
            text = "".join(heard.pieces)
            tokens, stopped, interrupted = len(self.tokenizer(text, add_special_tokens=False)["input_ids"]), False, True
        seconds = time.perf_counter() - began
        turn = Turn(self.active, self.system, message, text, tokens, seconds, stopped, interrupted, left_out)
        self.messages = [*asked[left_out:], {"role": "assistant", "content": text}]
        self.transcript.append(turn)
        return turn

    def _fitting(self, asked: list[dict[str, str]]) -> tuple[dict[str, Tensor], Sampling, int]:
        """The newest messages that leave room for an answer, how many tokens it may have, and how many are left out."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        room = longest_input(self.model.config)
        left_out = 0
        while True:
            encoded = encode_messages(self.tokenizer, [*system, *asked[left_out:]])
            length = encoded["input_ids"].shape[1]
            if room is None:
                return encoded, self.sampling, left_out
            fits = length + min(self.sampling.max_new_tokens, room // 2) <= room
            if fits or left_out + 2 >= len(asked):
                # A message alone that leaves no room at all is refused by ``answer``.
                most = max(1, min(self.sampling.max_new_tokens, room - length))
                return encoded, replace(self.sampling, max_new_tokens=most), left_out
            # A question goes with its answer.
            left_out += 2

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        if len(self.names) == 1:
            yield
        elif self.active == BASE:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(self.active, inference_mode=True)
            yield


@final
@dataclass(frozen=True)
class _Heard:
    """Passes text on and remembers it."""

    on_text: Callable[[str], object]
    pieces: list[str] = field(default_factory=list)

    def __call__(self, text: str) -> None:
        self.pieces.append(text)
        self.on_text(text)
