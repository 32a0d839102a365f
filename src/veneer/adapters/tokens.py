"""Single rows of an embedding table that are trained and saved, instead of the whole table.

An adapter keeps the new values of its rows, not their differences, as PEFT does: so a row that
``resize_token_embeddings`` filled at random is the trained one again after loading. Where other modules use the same
table (a tied head), they use the same rows.

Shape legend: V vocabulary, D width, K trained rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapters.index import Slot
from veneer.adapters.layer import relabel
from veneer.adapters.routing import Router
from veneer.adapters.rows import FIELD, TokenRows, table_of
from veneer.core.errors import MergeError, UsageError, listed

_HALF = (torch.float16, torch.bfloat16)
KEY = "token_adapter.trainable_tokens_delta"
"""The key of the rows after the table's path, in memory and on disk."""


@final
class TokenAdapter(nn.Module):
    """A table and the rows that adapters put in the place of its own, under PEFT's names."""

    base_layer: nn.Module
    trainable_tokens_delta: nn.ParameterDict
    token_indices: dict[str, tuple[int, ...]]
    live: tuple[str, ...]

    def __init__(self, base_layer: nn.Module, shares: TokenAdapter | None, router: Router) -> None:
        super().__init__()
        self.router = router
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict() if shares is None else shares.trainable_tokens_delta
        self.token_indices = {} if shares is None else shares.token_indices
        self.live = ()
        self.training = base_layer.training

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.router.idle:
            routing = self.router.current
            if routing is not None:
                return routing.through_tokens(self, x, y)
            self.router.check_told()
        for name in self.live:
            y = self.with_rows(name, x, y)
        return y

    def with_rows(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The table's output with an adapter's rows in the place of its own."""
        return (self._looked_up if isinstance(self.base_layer, nn.Embedding) else self._scored)(name, x, y)

    def _looked_up(self, name: str, x_N: Tensor, y_ND: Tensor) -> Tensor:
        module = self.base_layer
        ids_K, order_K = torch.tensor(self.token_indices[name], device=x_N.device).sort()
        place_N = torch.searchsorted(ids_K, x_N).clamp_(max=len(ids_K) - 1)
        rows_KD = self.trainable_tokens_delta[name].to(module.weight.dtype)
        padding = module.padding_idx
        # As in the table itself, the padding row is not taught by the tokens that are looked up.
        fixed = self.token_indices[name].index(padding) if padding in self.token_indices[name] else None
        rows_ND = F.embedding(order_K[place_N], rows_KD, padding_idx=fixed)
        scale = getattr(module, "embed_scale", None)
        if scale is not None:
            rows_ND = rows_ND * (scale.to(rows_ND.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((ids_K[place_N] == x_N).unsqueeze(-1), rows_ND.to(y_ND.dtype), y_ND)

    def _scored(self, name: str, x_ND: Tensor, y_NV: Tensor) -> Tensor:
        """The head's scores of the trained rows, in the place of those that its own gave."""
        module = self.base_layer
        ids_K = torch.tensor(self.token_indices[name], device=x_ND.device)
        rows_KD = self.trainable_tokens_delta[name].to(module.weight.dtype)
        bias_V = module._parameters["bias"]
        bias_K = None if bias_V is None else bias_V[ids_K]
        return y_NV.index_copy(-1, ids_K, F.linear(x_ND, rows_KD, bias_K).to(y_NV.dtype))

    def table(self, names: Iterable[str], W_VD: Tensor | None = None) -> Tensor:
        """The (V, D) table, or another one in its place, with the rows of some adapters; differentiable in them."""
        W_VD = table_of(self.base_layer) if W_VD is None else W_VD
        for name in names:
            ids_K = torch.tensor(self.token_indices[name], device=W_VD.device)
            W_VD = W_VD.index_copy(0, ids_K, self.trainable_tokens_delta[name].to(W_VD))
        return W_VD

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_layer = self.__dict__.get("_modules", {}).get("base_layer")
            if base_layer is None or name.startswith("__"):
                raise
            return getattr(base_layer, name)


@final
class TrainableTokensWrapper(nn.Module):
    """What stands in the table's place: PEFT's two levels, so that parameters have its names.

    ``weight`` is the table in use, for models that multiply by their embedding without calling it.
    """

    def __init__(self, module: nn.Module, shares: TokenAdapter | None, router: Router) -> None:
        super().__init__()
        self.token_adapter = TokenAdapter(module, shares, router)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["token_adapter"](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "token_adapter" not in self.__dict__.get("_modules", {}) or name.startswith("__"):
                raise
            adapter = self.token_adapter
            if name == "weight" and adapter.router.current is not None:
                raise UsageError(
                    "adapter_names cannot choose between the trained rows of this table: the model reads its weight "
                    "instead of calling it; run the adapters one after the other."
                ) from None
            return adapter.table(adapter.live) if name == "weight" and adapter.live else getattr(adapter, name)


@final
class TokenBank:
    """Every table of a model with trained rows, by path, and what is active or merged in it."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.wrappers: dict[str, TrainableTokensWrapper] = {}
        self.slots: dict[str, Slot] = {}
        self.rows: dict[str, dict[str, TokenRows]] = {}
        """From adapter to the path that its rows are saved under."""
        self.merged: tuple[str, ...] = ()
        self.unmerged: dict[str, nn.Parameter] = {}

    def fresh(
        self, rows: Sequence[TokenRows], whole: Iterable[str], widen: bool, device: torch.device | str | None
    ) -> dict[str, Tensor]:
        """The rows of a new adapter by path: those of a file, or as they start, those of the table.

        Args:
            rows: what it trains.
            whole: modules that are adapted or saved whole, which cannot be tables of these.
            widen: halves are too coarse to train in, and become float32.
            device: where they go instead of beside the table.

        Raises:
            UsageError: a table is adapted or saved whole, or shared in another way than other adapters share it.
        """
        self._check(rows, list(whole))
        found = {}
        for each in rows:
            W_VD = self.unmerged.get(each.slot.path, table_of(each.slot.module)).detach()
            start_KD = each.values
            if start_KD is None:
                start_KD = W_VD[torch.tensor(each.indices, device=W_VD.device)]
            dtype = torch.float32 if widen and start_KD.dtype in _HALF else start_KD.dtype
            # What was loaded stays where it is beside a table without values.
            where = device or (start_KD.device if W_VD.is_meta else W_VD.device)
            found[each.slot.path] = start_KD.to(where, dtype, copy=True)
        return found

    def _check(self, rows: Sequence[TokenRows], taken: Sequence[str]) -> None:
        for path in [*self.wrappers, *(path for each in rows for path in each.paths)]:
            clash = next((other for other in taken if other == path or path.startswith(f"{other}.")), None)
            if clash is not None:
                raise UsageError(
                    f"{FIELD} trains rows of {path!r}, while {clash!r} is adapted or saved whole; leave one of the two "
                    "out."
                )
        for each in rows:
            for path in each.paths:
                if path in self.wrappers and self._shares(path) != (path != each.slot.path):
                    raise UsageError(
                        f"{FIELD} uses the table of {path!r} in another way than the adapters that are there: shared "
                        "with another module, or on its own; name the same modules."
                    )

    def _shares(self, path: str) -> bool:
        return any(path in each.paths[1:] for rows in self.rows.values() for each in rows.values())

    def add(self, name: str, rows: Sequence[TokenRows], tensors: Mapping[str, Tensor]) -> None:
        """Take in an adapter's rows, by path. They are not active yet."""
        self.rows[name] = {each.slot.path: each for each in rows}
        for each in rows:
            owner = self._wrap(each.slot, None).token_adapter
            for slot in each.tied:
                self._wrap(slot, owner)
            owner.trainable_tokens_delta[name] = nn.Parameter(tensors[each.slot.path], requires_grad=False)
            owner.token_indices[name] = each.indices

    def _wrap(self, slot: Slot, shares: TokenAdapter | None) -> TrainableTokensWrapper:
        if slot.path not in self.wrappers:
            self.wrappers[slot.path], self.slots[slot.path] = (
                TrainableTokensWrapper(slot.module, shares, self.router),
                slot,
            )
            _hang(slot, self.wrappers[slot.path])
        return self.wrappers[slot.path]

    def of(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's rows, by the path that they are saved under."""
        return {
            path: self.wrappers[path].token_adapter.trainable_tokens_delta[name] for path in self.rows.get(name, ())
        }

    def covered(self, name: str) -> dict[str, frozenset[int]]:
        """The token ids that an adapter trains, by the path of every module that uses them."""
        return {path: frozenset(each.indices) for each in self.rows.get(name, {}).values() for path in each.paths}

    def check_together(self, names: Sequence[str]) -> None:
        """Refuse adapters that train the same row: only one of them can be in use.

        Raises:
            UsageError: two do.
        """
        seen: dict[tuple[str, int], str] = {}
        for name in names:
            for path, ids in self.covered(name).items():
                for token in sorted(ids):
                    if seen.setdefault((path, token), name) != name:
                        raise UsageError(
                            f"Adapters {listed([seen[path, token], name])} both train the row of token {token} in "
                            f"{path!r}; only one of them can be in use at a time."
                        )

    def show(self, active: Sequence[str]) -> None:
        """Let the forward pass use the rows of these adapters, but for those that are merged."""
        for path, wrapper in self.wrappers.items():
            adapter = wrapper.token_adapter
            adapter.live = tuple(n for n in active if path in self.covered(n) and n not in self.merged)

    def set_trainable(self, names: Sequence[str]) -> None:
        """Let the rows of these adapters learn, and of no others."""
        for name in self.rows:
            for parameter in self.of(name).values():
                parameter.requires_grad_(name in names)

    def materialise(self, name: str) -> None:
        """Give rows that were made on the meta device memory beside their table, not yet filled."""
        for path, parameter in self.of(name).items():
            if parameter.is_meta:
                adapter = self.wrappers[path].token_adapter
                here = torch.empty_like(parameter, device=table_of(adapter.base_layer).device)
                adapter.trainable_tokens_delta[name] = nn.Parameter(here, requires_grad=parameter.requires_grad)

    def unties(self, names: Sequence[str], tied: Mapping[str, Sequence[str]]) -> str | None:
        """A table that shares its weight with a module which would not get the rows once ``names`` are merged."""
        for name in names:
            covered = self.covered(name)
            for path, ids in covered.items():
                if any(covered.get(other) != ids for other in tied.get(path, ())):
                    return path
        return None

    def ready(self, merged: Sequence[str], names: Sequence[str], safe: bool) -> tuple[str, ...]:
        """Check that these adapters can be merged on top of those that are.

        Returns:
            The adapters whose rows are merged now.

        Raises:
            UsageError: two train the same row.
            MergeError: ``safe``, and values that are not finite.
        """
        self.check_together([*merged, *names])
        for name in names if safe else ():
            if not all(rows.isfinite().all() for rows in self.of(name).values()):
                raise MergeError(f"The rows that {name!r} trains have values that are not finite.")
        return self.merged

    def merge(self, names: Sequence[str], *, reversible: bool) -> None:
        """Put the rows of these adapters into new tables, on top of those that are merged already."""
        made: dict[tuple[int, ...], tuple[nn.Parameter, nn.Parameter]] = {}
        for path, wrapper in self.wrappers.items():
            adapter = wrapper.token_adapter
            here = [name for name in names if path in self.covered(name)]
            if not here:
                continue
            before = table_of(adapter.base_layer)
            # Modules that share table and rows go on sharing them.
            key = (id(before), *(id(adapter.trainable_tokens_delta[name]) for name in here))
            if key not in made:
                with torch.no_grad():
                    made[key] = nn.Parameter(adapter.table(here), requires_grad=False), before
            if reversible:
                self.unmerged.setdefault(path, before)
            adapter.base_layer.weight = made[key][0]
        self.merged = (*self.merged, *(name for name in names if name in self.rows))
        for wrapper in self.wrappers.values():
            adapter = wrapper.token_adapter
            adapter.live = tuple(name for name in adapter.live if name not in self.merged)

    def written(self, module: nn.Module, leaf: str, W_VD: Tensor) -> Tensor:
        """A tensor of a module with the rows that are in use, when it is a table that has some."""
        for wrapper in self.wrappers.values() if leaf == "weight" else ():
            if wrapper.token_adapter.base_layer is module:
                return wrapper.token_adapter.table(wrapper.token_adapter.live, W_VD)
        return W_VD

    def restore(self) -> None:
        """Give every table its original weight back, the very same tensor."""
        for path, original in self.unmerged.items():
            module = self.wrappers[path].token_adapter.base_layer
            now = table_of(module)
            if (original.device, original.dtype) != (now.device, now.dtype):
                # The model was moved or cast while merged, and the kept tensor was out of sight of ``to()``.
                original.data = original.data.to(now.device, now.dtype)
            module.weight = original
        self.unmerged, self.merged = {}, ()

    def rename(self, old: str, new: str) -> None:
        """Keep an adapter's rows under another name."""
        for path in self.rows.get(old, {}):
            adapter = self.wrappers[path].token_adapter
            relabel(adapter.trainable_tokens_delta, old, new)
            relabel(adapter.token_indices, old, new)
        for wrapper in self.wrappers.values():
            live = wrapper.token_adapter.live
            wrapper.token_adapter.live = tuple(new if name == old else name for name in live)
        if old in self.rows:
            relabel(self.rows, old, new)
        self.merged = tuple(new if name == old else name for name in self.merged)

    def remove(self, name: str) -> None:
        """Forget an adapter's rows. Tables without any are unwrapped."""
        for path in self.rows.pop(name, {}):
            if path in self.wrappers:
                adapter = self.wrappers[path].token_adapter
                adapter.token_indices.pop(name, None)
                if name in adapter.trainable_tokens_delta:
                    del adapter.trainable_tokens_delta[name]
        used = {path for rows in self.rows.values() for each in rows.values() for path in each.paths}
        for path in [path for path in self.wrappers if path not in used]:
            self._unwrap(path)

    def unload(self) -> None:
        """Put the tables themselves back, with what is merged into them."""
        for path in list(self.wrappers):
            self._unwrap(path)
        self.rows.clear()

    def _unwrap(self, path: str) -> None:
        _hang(self.slots.pop(path), self.wrappers.pop(path).token_adapter.base_layer)


def _hang(slot: Slot, module: nn.Module) -> None:
    for parent, attribute in slot.places:
        parent._modules[attribute] = module
