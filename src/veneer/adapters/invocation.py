"""Where adapters with ``alora_invocation_tokens`` begin: found anew in every call of the model.

A hook on the base model looks for the tokens in ``input_ids`` and lends the layers a mask for the length of the call.
It sees direct calls and those of ``generate`` alike. Where the invocation was is remembered with the cache of keys and
values, so that the tokens that follow are changed too.

Shape legend: B sequences, T tokens of this call, K invocation tokens.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.adapters.layer import SharedTensors, relabel
from veneer.adapters.routing import Router
from veneer.core.config import LoraConfig, PeftConfig
from veneer.core.errors import ConfigError, UsageError

MASK = "alora_mask"
OFFSETS = "alora_offsets"
"""PEFT's keyword that says outright where to begin: tokens from the end for each sequence, or None."""

NEVER = torch.iinfo(torch.int64).max
"""The start of an adapter that is not invoked."""


def check_tokens(model: nn.Module, config: PeftConfig, targets: Iterable[str], head: str | None) -> None:
    """Refuse models and modules in which invocation tokens cannot be found again.

    Raises:
        ConfigError: no ``input_ids``, two sequences (an encoder's and a decoder's), or a head that sees only
            some tokens.
    """
    if not _tokens(config):
        return
    name = type(model).__name__
    if "input_ids" not in inspect.signature(type(model).forward).parameters:
        raise ConfigError(f"alora_invocation_tokens needs a model that takes input_ids, which {name} does not.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"alora_invocation_tokens needs one sequence of tokens, and {name} has an encoder's too.")
    if head is not None and head in targets:
        raise ConfigError(
            f"alora_invocation_tokens cannot be used on {head!r}: a head may see some of the tokens only; take "
            "it out of target_modules."
        )


def _tokens(config: PeftConfig) -> list[int] | None:
    return config.alora_invocation_tokens if isinstance(config, LoraConfig) else None


@final
class Invocations:
    """The adapters of a model that are activated by tokens, and what the call at hand needs of them."""

    def __init__(self, model: nn.Module, shared: SharedTensors, router: Router) -> None:
        self.model = model
        self.shared = shared
        self.router = router
        self.tokens: dict[str, list[int]] = {}
        self.active: tuple[str, ...] = ()
        self.hooks: list[RemovableHandle] = []
        self.prompt: dict[str, Tensor] | None = None
        """The first activated position of each sequence that ``generate`` was given, while it runs."""
        self.starts: weakref.WeakKeyDictionary[Any, dict[str, Tensor]] = weakref.WeakKeyDictionary()
        """Where the adapters began, of the last token in each cache."""
        self.found: dict[str, Tensor] = {}
        self.open: weakref.ref[Tensor] | None = None
        """The output of a call whose layers will be run again during backward."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("starts", "open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, starts=weakref.WeakKeyDictionary(), open=None)

    def add(self, name: str, config: PeftConfig) -> None:
        """Take in an adapter; without tokens in its config nothing happens."""
        tokens = _tokens(config)
        if not tokens:
            return
        self.tokens[name] = list(tokens)
        if not self.hooks:
            self.hooks = [
                self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.model.register_forward_hook(self._leave, with_kwargs=True),
            ]

    def remove(self, name: str) -> None:
        """Forget an adapter; the last one takes the hooks along."""
        self.tokens.pop(name, None)
        self.shared.lend(name, {})
        if not self.tokens:
            for hook in self.hooks:
                hook.remove()
            self.hooks = []

    def clear(self) -> None:
        """Forget all adapters."""
        for name in list(self.tokens):
            self.remove(name)

    def rename(self, old: str, new: str) -> None:
        """Keep an adapter under another name."""
        if old in self.tokens:
            relabel(self.tokens, old, new)

    def show(self, active: Sequence[str]) -> None:
        """Settle which of them the forward uses."""
        self.active = tuple(name for name in active if name in self.tokens)

    def _used(self) -> list[str]:
        """The adapters that the call at hand goes through."""
        routing = self.router.current
        return [name for name in (self.active if routing is None else routing.order) if name in self.tokens]

    # A call

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        offsets = kwargs.pop(OFFSETS, None)
        used = self._used()
        if not used:
            return args, kwargs
        given = functools.partial(_argument, module, args, kwargs)
        ids = given("input_ids")
        sequence = given("inputs_embeds") if ids is None else ids
        if sequence is None or (ids is None and offsets is None and self.prompt is None):
            raise UsageError(
                "An adapter with alora_invocation_tokens looks for them in input_ids, which this call does not have; "
                f"give input_ids, or {OFFSETS} beside inputs_embeds."
            )
        cache = given("past_key_values")
        before = 0 if cache is None else int(cache.get_seq_length())
        rows, length = sequence.shape[:2]
        here_T = torch.arange(before, before + length, device=sequence.device)
        self.found = {}
        for name in used:
            if offsets is not None:
                start = _from_offsets(offsets, rows, before + length)
            elif self.prompt is not None:
                start = self._of_prompt(name, rows)
            else:
                found_BT = starts(sequence, self.tokens[name], given("position_ids"), before)
                start = torch.minimum(found_BT, self._remembered(name, cache, found_BT)) if before else found_BT
            self.found[name] = start.to(sequence.device)
        masks = {name: (here_T >= start).expand(rows, length) for name, start in self.found.items()}
        if self.router.current is not None:
            # A layer gives each adapter its own rows alone; beams of one prompt stand next to each other.
            run = rows // len(self.router.current.names)
            owners = [name for name in self.router.current.names for _ in range(run)]
            mine = {name: [row for row, owner in enumerate(owners) if owner == name] for name in masks}
            masks = {name: mask_BT[mine[name]] for name, mask_BT in masks.items()}
        self._check_open(masks)
        for name, mask_BT in masks.items():
            self.shared.lend(name, {MASK: mask_BT})
        return args, kwargs

    def _of_prompt(self, name: str, rows: int) -> Tensor:
        assert self.prompt is not None
        start_B1 = self.prompt[name]
        if rows % len(start_B1):
            raise UsageError(f"generate was given {len(start_B1)} sequences, but the model is called with {rows}.")
        # Beams and several answers to one prompt stand next to each other.
        return start_B1.repeat_interleave(rows // len(start_B1), dim=0)

    def _remembered(self, name: str, cache: Any, found_BT: Tensor) -> Tensor:
        """Where the adapter began in the tokens that a cache holds; it goes on from there."""
        known = self.starts.get(cache, {}).get(name)
        if known is None or len(known) != len(found_BT):
            return torch.full_like(found_BT[:, :1], NEVER)
        return known.to(found_BT.device)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        used = self._used()
        if not used:
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self.starts[cache] = {name: start[:, -1:] for name, start in self.found.items()}
        if torch.is_grad_enabled() and getattr(module, "is_activation_checkpointing", False):
            # Layers are run again during backward, and need their masks then.
            self._keep_open(output)
        else:
            for name in used:
                self.shared.lend(name, {})

    def _keep_open(self, output: Any) -> None:
        tensor = next((t for t in (output.values() if isinstance(output, Mapping) else output) if _learns(t)), None)
        if tensor is not None:
            self.open = weakref.ref(tensor)
            tensor.register_hook(self._close)

    def _close(self, gradient: Tensor) -> None:
        self.open = None

    def _check_open(self, masks: Mapping[str, Tensor]) -> None:
        if self.open is None or self.open() is None:
            return
        for name, mask_BT in masks.items():
            kept = self.shared.lent.get(name, {}).get(MASK)
            if kept is None or not torch.equal(
                kept, mask_BT.expand_as(kept) if mask_BT.shape != kept.shape else mask_BT
            ):
                raise UsageError(
                    "With gradient checkpointing, an adapter with alora_invocation_tokens needs the backward pass of "
                    "one call before the next call on other tokens."
                )

    # generate

    def generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """The model's ``generate``, in which the invocation is that of the prompt from its first to its last step."""

        @functools.wraps(generate)
        def from_prompt(*args: Any, **kwargs: Any) -> Any:
            offsets = kwargs.pop(OFFSETS, None)
            if not self._used():
                return generate(*args, **kwargs)
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            if ids is None:
                raise UsageError(
                    "An adapter with alora_invocation_tokens looks for them in the prompt; give generate its input_ids."
                )
            rows, length = (1, len(ids)) if ids.ndim == 1 else ids.shape
            self.prompt = {
                name: starts(ids.view(rows, length), self.tokens[name])[:, -1:]
                if offsets is None
                else _from_offsets(offsets, rows, length)
                for name in self._used()
            }
            try:
                return generate(*args, **kwargs)
            finally:
                self.prompt = None

        return from_prompt


def starts(ids_BT: Tensor, tokens: Sequence[int], position_ids: Tensor | None = None, before: int = 0) -> Tensor:
    """For every token, where the last invocation of its document begins.

    Args:
        ids_BT: token ids.
        tokens: the K invocation tokens.
        position_ids: (B, T) or (1, T); where they start again at 0, another document begins in the row.
        before: how many tokens came before these.

    Returns:
        (B, T) int64; ``NEVER`` in a document without an invocation.
    """
    rows, length = ids_BT.shape
    match_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    document_BT = torch.zeros_like(ids_BT)
    if position_ids is not None and position_ids.shape[-1] == length:
        document_BT = (position_ids == 0).long().cumsum(-1).expand(rows, length)
    for number, token in enumerate(tokens):
        whole = max(length - number, 0)
        follows = (ids_BT[:, number:] == token) & (document_BT[:, number:] == document_BT[:, :whole])
        match_BT = match_BT & nn.functional.pad(follows, (0, length - whole))
    place_BT = torch.where(match_BT, torch.arange(length, device=ids_BT.device), -1)
    last_BD = torch.full((rows, int(document_BT.max()) + 1), -1, device=ids_BT.device)
    last_BD = last_BD.scatter_reduce(1, document_BT, place_BT, "amax")
    found_BT = last_BD.gather(1, document_BT)
    return torch.where(found_BT < 0, NEVER, found_BT + before)


def _from_offsets(offsets: Sequence[int | None], rows: int, end: int) -> Tensor:
    """(B, 1) first changed positions from PEFT's offsets, which count from the end."""
    if len(offsets) != rows:
        raise UsageError(f"{OFFSETS} has {len(offsets)} entries for {rows} sequences; expected one each.")
    return torch.tensor([[max(end - int(offset), 0) if offset else NEVER] for offset in offsets])


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """An argument of a call to the model, by position or name; None when it is not given."""
    if name in kwargs or not args:
        return kwargs.get(name)
    return dict(zip(inspect.signature(type(module).forward).parameters, (module, *args), strict=False)).get(name)


def _learns(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
