"""Rows of one batch through different adapters: ``model(**batch, adapter_names=["a", "b", "__base__"])``.

Which row belongs to which adapter is settled once, where the batch enters the model. Every adapted layer reads it from
the model's one ``Router``, so nothing is passed through the model's own code; a layer that is computed again in the
backward pass (gradient checkpointing) gets the routing that its forward pass had. Many plain low-rank adapters on one
linear layer are computed together, from their stacked factors.

Shape legend: N rows of the batch, G adapters, T tokens of a row, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from veneer.adapters.layout import check_layout
from veneer.adapters.stacked import Stacks
from veneer.core.base import InputBase, WeightBase
from veneer.core.errors import UsageError, listed

if TYPE_CHECKING:
    from veneer.adapters.adapted import AdaptedModel
    from veneer.adapters.layer import AdaptedLayer
    from veneer.adapters.saved import ModulesToSaveWrapper
    from veneer.adapters.tokens import TokenAdapter

BASE = "__base__"
"""The name of rows that go through the base model alone."""

_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "inputs", "x")


@final
class Router:
    """What the layers of one model share: the routing of the batch that is running, if it has one."""

    def __init__(self) -> None:
        self.current: Routing | None = None
        self.idle = True
        """Whether layers and models need not look here: no batch is routed, and none before left anything behind."""
        self.learned = False
        """Whether a routed batch ran with gradients: a layer in the backward pass must then be told its routing."""
        self.told = False
        self.thread: int | None = None
        self.stacks = Stacks()

    def __deepcopy__(self, memo: Any) -> Router:
        return Router()

    def __reduce__(self) -> tuple[Any, ...]:
        return Router, ()

    @contextmanager
    def holding(self, routing: Routing | None) -> Iterator[None]:
        """Let layers see this routing for the length of a with block."""
        before = self.current, self.told, self.thread
        here = threading.get_ident()
        if self.thread not in (None, here):
            raise UsageError(
                "Another thread is running this model with adapter_names; give each thread its own copy, or wait."
            )
        self.current, self.told, self.idle, self.thread = routing, True, False, here
        try:
            yield
        finally:
            self.current, self.told, self.thread = before
            self.idle = self.current is None and not self.learned and not self.stacks

    def check_told(self) -> None:
        """Refuse to compute a layer again without knowing whether its batch was routed."""
        if self.learned and not self.told and torch._C._current_graph_task_id() != -1:
            raise UsageError(
                "This model was trained with adapter_names and is computed again in the backward pass by a "
                "checkpointing that does not say which batch it belongs to; use model.gradient_checkpointing_enable() "
                "of transformers, or train without checkpointing."
            )


@final
class Routing:
    """Which adapter every row of a batch goes through."""

    def __init__(self, names: Sequence[str], router: Router) -> None:
        self.names = tuple(names)
        self.router = router
        self.order = tuple(dict.fromkeys(names))
        self.uniform = self.order[0] if len(self.order) == 1 else None
        # Sizes of a first dimension that are known to count rows, each row so many times in a run.
        self.sizes = {len(self.names)}
        self.flat = self.deep = False
        self.run = 1
        self._groups: dict[tuple[int, torch.device], Groups] = {}

    def alone(self, name: str) -> Routing:
        """The routing of rows that all belong to one adapter."""
        return Routing((name,), self.router)

    def observe(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, runs: bool = False) -> None:
        """Learn from the arguments of the model how its rows may be laid out inside.

        Raises:
            UsageError: the batch has another number of rows than there are names.
        """
        count = len(self.names)
        entry = _entry(args, kwargs)
        rows = None if entry is None or not entry.ndim else entry.shape[0]
        run = 0 if rows is None else rows // count
        # Where rows are taken out of a running batch, what is left may be a multiple of them by chance.
        if rows is not None and (run * count != rows or run < self.run or (run > 1 and not runs)):
            raise UsageError(f"adapter_names has {count} names, but the batch has {rows} rows; give one name a row.")
        self.run = max(run, self.run)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        for tensor in tensors:
            if tensor.shape[0] == rows:
                size = 1
                for dimension in tensor.shape[: None if not tensor.is_floating_point() else -1]:
                    size *= dimension
                    self.sizes.add(size)
        if entry is not None:
            self.flat = entry.ndim == 1
            # Each row may be several inside (the choices of a question).
            self.deep = entry.ndim > 2 and not entry.is_floating_point()

    def groups(self, x: Tensor, what: nn.Module) -> Groups:
        """The rows of a tensor by adapter.

        Raises:
            UsageError: its first dimension is not known to be that of the batch.
        """
        rows = x.shape[0] if x.ndim else 0
        if rows not in self.sizes or rows % len(self.names) or (x.ndim == 1 and not self.flat):
            raise UsageError(
                f"adapter_names cannot be used on this {type(what).__name__}: its input has the shape "
                f"{tuple(x.shape)} in a batch of {len(self.names)} rows, so which row is whose cannot be known; run "
                "the adapters one after the other."
            )
        key = (rows, x.device)
        if key not in self._groups:
            self._groups[key] = Groups(self, rows, x.device)
        return self._groups[key]

    def through(self, layer: AdaptedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An adapted layer's output."""
        here = [name for name in self.order if name in layer.specs]
        if not here:
            return layer.base_layer(*args, **kwargs)
        if issubclass(layer.base_class, WeightBase):
            return self.split(layer, lambda _: layer.run, args, kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if self.uniform is not None:
            return layer.add(self.uniform, x, None)
        if x.shape[0] == 1 and 1 not in self.sizes and not self.deep:
            # One row that the model spreads over the batch later, such as positions.
            x = x.expand(len(self.names) * self.run, *x.shape[1:])
        groups, base = self.groups(x, layer.base_layer), layer.base
        assert isinstance(base, InputBase)
        y = base.frozen(x)
        added = self.router.stacks.add(layer, here, self.order, groups.slot_N, x, y)
        if added is not None:
            return added
        return groups.joined(
            [
                layer.add(name, x[rows], y[rows]) if name in layer.specs else y[rows]
                for name, rows in zip(self.order, groups.rows, strict=True)
            ]
        )

    def through_tokens(self, adapter: TokenAdapter, x: Tensor, y: Tensor) -> Tensor:
        """A table's output with the rows that adapters trained of it."""
        if not any(name in adapter.token_indices for name in self.order):
            return y
        if self.uniform is not None:
            return adapter.with_rows(self.uniform, x, y)
        groups = self.groups(x, adapter.base_layer)
        return groups.joined(
            [
                adapter.with_rows(name, x[rows], y[rows]) if name in adapter.token_indices else y[rows]
                for name, rows in zip(self.order, groups.rows, strict=True)
            ]
        )

    def through_whole(self, wrapper: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a module that is trained whole."""
        chosen = {name: wrapper.module_for(name) for name in self.order}
        if len({id(module) for module in chosen.values()}) == 1:
            return chosen[self.order[0]](*args, **kwargs)
        return self.split(wrapper, lambda name: chosen[name], args, kwargs)

    def shown(self, layer: AdaptedLayer) -> tuple[str, ...]:
        """The adapter whose weight a layer shows to whoever reads it."""
        if self.uniform is None:
            raise UsageError(
                f"adapter_names cannot mix adapters here: the weight of {layer.kind!r} layers is read for all rows at "
                "once (torch's fused encoder does so in evaluation); run the adapters one after the other."
            )
        return (self.uniform,) if self.uniform in layer.specs else ()

    def split(
        self, what: nn.Module, run: Callable[[str], Callable[..., Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the rows of each adapter on their own, with all arguments that have rows."""
        if self.uniform is not None:
            return run(self.uniform)(*args, **kwargs)
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        groups = self.groups(x, getattr(what, "base_layer", what))
        outputs = []
        for name, rows in zip(self.order, groups.rows, strict=True):

            def part(value: Any, rows: Tensor = rows) -> Any:
                return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == len(x) else value

            # Modules inside see these rows alone, in whatever layout.
            with self.router.holding(self.alone(name)):
                outputs.append(run(name)(*map(part, args), **{key: part(value) for key, value in kwargs.items()}))
        return _joined(groups, outputs)


@final
class Groups:
    """The rows of a tensor by adapter, and the way back."""

    def __init__(self, routing: Routing, count: int, device: torch.device) -> None:
        run = count // len(routing.names)
        place = {name: number for number, name in enumerate(routing.order)}
        self.slot_N = torch.tensor([place[name] for name in routing.names for _ in range(run)], device=device)
        """(N,) the number of each row's adapter in the routing's order."""
        self.rows = [(self.slot_N == number).nonzero().squeeze(1) for number in range(len(place))]
        self._back = torch.cat(self.rows).argsort()

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts of the adapters as one tensor, in the order of the batch."""
        return torch.cat(list(parts))[self._back]


def forward(adapted: AdaptedModel, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a model, its rows through the adapters named, or all through the active ones when ``names`` is None.

    Raises:
        UsageError: see ``route``; also when a layer cannot tell which row is whose.
    """
    model = adapted._modules["model"]
    assert model is not None
    routing = None if names is None else route(adapted, names)
    if routing is not None:
        routing.observe(args, kwargs)
    router = adapted.router
    with ExitStack() as stack:
        if torch.is_grad_enabled():
            router.learned = router.learned or routing is not None
            stack.enter_context(_remembered(adapted, routing))
            router.stacks.clear()
        stack.enter_context(router.holding(routing))
        return model(*args, **kwargs)


def with_names(adapted: AdaptedModel, generate: Callable[..., Any]) -> Callable[..., Any]:
    """A model's ``generate`` that takes ``adapter_names`` too: one name for each row of the prompt.

    Where generation runs each row several times (beams, several returned sequences), they all use its adapter.
    """

    @functools.wraps(generate)
    def run(*args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return generate(*args, **kwargs)
        if kwargs.get("guidance_scale") not in (None, 1, 1.0):
            raise UsageError("guidance_scale doubles the batch in its own order; leave it out or leave adapter_names.")
        routing = route(adapted, adapter_names)
        routing.observe(args, kwargs)

        def before(module: nn.Module, inner: tuple[Any, ...], keyed: dict[str, Any]) -> None:
            routing.observe(inner, keyed, runs=True)

        # Generation calls the encoder by itself.
        entries: list[Any] = [adapted.model]
        if getattr(adapted.model.config, "is_encoder_decoder", False):
            entries.append(adapted.model.get_encoder())  # type: ignore[operator]
        hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in entries]
        try:
            with adapted.router.holding(routing):
                return generate(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    return run


def route(adapted: AdaptedModel, names: Sequence[str]) -> Routing:
    """Check which adapter each row is for.

    Args:
        adapted: the model.
        names: for each row of the batch the name of an adapter, or ``"__base__"`` for the base model alone.

    Raises:
        UsageError: an unknown name, adapters that are disabled or merged, or adapters or a model whose rows cannot
            be told apart.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not len(names):
        raise UsageError(f"adapter_names must be a list with one adapter name for each row, not {names!r}.")
    routing = Routing(names, adapted.router)
    for name in routing.order:
        if name != BASE:
            adapted.require(name)
    if not adapted.enabled:
        raise UsageError(
            f"The adapters are disabled, so adapter_names has no meaning; leave the disable_adapter() block, or use "
            f"{BASE!r} for rows without an adapter."
        )
    merged = list(dict.fromkeys(name for layer in adapted.layers.values() for name in layer.merged_adapters))
    if merged:
        raise UsageError(
            f"{listed(merged)} is merged into the weights that all rows share; call unmerge_adapter() before using "
            "adapter_names."
        )
    shown = adapted.biases.shown
    biased = [name for name in routing.order if name in adapted.biases.trained]
    if (biased or shown is not None) and (routing.uniform is None or routing.uniform != shown):
        raise UsageError(
            f"{listed(biased or [str(shown)])} trains the base's biases, which all rows share; adapter_names cannot "
            "mix it with others: activate one adapter after the other."
        )
    if routing.uniform is None:
        check_layout(adapted, routing.order)
    return routing


def _entry(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The argument of a model that has its rows."""
    named = [kwargs.get(name) for name in _INPUTS]
    every = (*args[:1], *named, *args[1:], *kwargs.values())
    return next((value for value in every if isinstance(value, Tensor)), None)


def _joined(groups: Groups, outputs: list[Any]) -> Any:
    """Outputs of the groups as one, also where each is a tuple."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return groups.joined(outputs)
    if isinstance(first, tuple):
        return tuple(_joined(groups, list(column)) for column in zip(*outputs, strict=True))
    if first is None:
        return None
    raise UsageError(f"adapter_names cannot put outputs of type {type(first).__name__} together row by row.")


@contextmanager
def _remembered(adapted: AdaptedModel, routing: Routing | None) -> Iterator[None]:
    """Let transformers' gradient checkpointing compute every block again under the routing that it had."""
    router = adapted.router

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with router.holding(routing):
                return function(*args, **kwargs)

        return run

    def remembering(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        return lambda function, *args, **kwargs: checkpoint(again(function), *args, **kwargs)

    every = (adapted.model, *(slot.module for slot in adapted.index.slots.values()))
    own = [module.__dict__ for module in every if "_gradient_checkpointing_func" in module.__dict__]
    before = [held["_gradient_checkpointing_func"] for held in own]
    for held, checkpoint in zip(own, before, strict=True):
        held["_gradient_checkpointing_func"] = remembering(checkpoint)
    try:
        yield
    finally:
        for held, checkpoint in zip(own, before, strict=True):
            held["_gradient_checkpointing_func"] = checkpoint
