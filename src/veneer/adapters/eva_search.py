"""The search for the directions in which the inputs of layers vary most, and for the ranks that follow from them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer.adapters.evidence import Latest, watching
from veneer.adapters.index import view
from veneer.adapters.targets import Selection, Target
from veneer.core.config import LowRankConfig
from veneer.core.errors import ConfigError, UsageError
from veneer.core.start_config import EvaConfig
from veneer.kernels.directions import Directions

PASSES = 100
"""How often data is gone through before a search that does not settle is given up."""

LayerInputs = Callable[[Any, Any, str], Tensor]
"""From a layer's input, what the batch was made into, and the layer's name, to the rows that count."""


def every_row(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    x: Tensor = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    return x.reshape(-1, x.shape[-1])


@dataclass
class _Watch:
    """One input that is looked at, of the layer that gets it first."""

    directions: Directions
    waiting: list[Tensor]
    """Rows that are still too few to be added."""
    found: Tensor
    """Which directions are as they were one batch before."""
    open: bool = True


@final
class Search:
    """Directions of all layers, growing batch by batch."""

    def __init__(
        self,
        selection: Selection,
        prefix: str,
        prepare: LayerInputs | Mapping[str, LayerInputs] | None,
        gather: bool,
    ) -> None:
        assert isinstance(selection.config, LowRankConfig)
        assert isinstance(selection.config.eva_config, EvaConfig)
        self.options = selection.config.eva_config
        self.targets = {f"{prefix}{target.slot.path}": target for target in selection.targets}
        for target in selection.targets:
            _check_rows(target)
        self.prepare = prepare if isinstance(prepare, Mapping) else dict.fromkeys(self.targets, prepare or every_row)
        unknown = [name for name in self.prepare if name not in self.targets]
        if unknown:
            raise UsageError(f"prepare_layer_inputs_fn names {unknown[0]!r}, which is no adapted layer.")
        self.gather = gather and dist.is_available() and dist.is_initialized()
        self.device = view(selection.targets[0].slot).placement()[0]
        self.context: Any = None
        self.leaders: dict[str, str] = {}
        self.latest, self.newest = Latest(), ""
        self.watches: dict[str, _Watch] = {}
        self.most = {name: round(target.r * self.options.rho) for name, target in self.targets.items()}
        for name, target in self.targets.items():
            self.most[name] = min(self.most[name], *view(target.slot).shape())
        self.ranks: dict[str, int] = {}

    def run(
        self,
        dataloader: Iterable[Any],
        forward: Callable[[Any], object],
        prepare: Callable[[Any], Any],
        *,
        progress: bool,
    ) -> None:
        """Go through the batches, again and again, until every direction that a rank is given to has settled.

        Args:
            dataloader: the batches.
            forward: runs the model on one.
            prepare: makes of a batch what the rows of its layers are chosen by.
            progress: whether to say on standard error how far it is.

        Raises:
            UsageError: no batches, or directions that do not settle.
        """
        try:
            for batch in again_and_again(dataloader):
                moved = moved_to(batch, self.device)
                self.context = prepare(moved)
                with watching(self.open_modules(), self.see):
                    forward(moved)
                done = self.settle()
                if progress:
                    print(f"\rEVA: {done} of {len(self.watches)} inputs settled", end="", file=sys.stderr, flush=True)
                if done == len(self.watches):
                    return
        finally:
            if progress:
                print(file=sys.stderr)
        raise UsageError(
            f"EVA's directions did not settle in {PASSES} passes over the data; give more data, a lower tau or "
            f"batches with more tokens that count (at least {self.needed()})."
        )

    def needed(self) -> int:
        """How many rows a batch should have."""
        return max(self.most.values())

    def open_modules(self) -> dict[str, nn.Module]:
        """The layers to look at: at first all, to see which share an input, then one for each that is open."""
        names = self.targets if not self.watches else [name for name, watch in self.watches.items() if watch.open]
        return {name: self.targets[name].slot.module for name in names}

    def see(self, name: str, x: Tensor) -> None:
        """The input of a layer."""
        if name not in self.leaders:
            # q, k and v get one and the same input: it is looked at once, for the first of them.
            shared = self.latest.again(x) and self.prepare.get(self.newest) is self.prepare.get(name)
            self.leaders[name] = leader = self.newest if shared else name
            self.newest = leader
            if leader != name:
                self.most[leader] = max(self.most[leader], self.most[name])
                return
            self.watches[name] = _Watch(Directions(0), [], torch.zeros(0, dtype=torch.bool))
        if self.leaders[name] != name:
            return
        rows = self.prepare.get(name, every_row)(x.detach(), self.context, name)
        self.watches[name].waiting.append(_gathered(rows) if self.gather else rows)

    def settle(self) -> int:
        """Add what was seen, give out ranks, and say how many inputs need no further look."""
        unseen = [name for name in self.targets if name not in self.leaders]
        if unseen:
            raise UsageError(f"The first batch did not reach {unseen[0]!r}; leave it out of target_modules.")
        for name, leader in self.leaders.items():
            self.most[name] = self.most[leader]
        for leader, watch in self.watches.items():
            count = self.most[leader]
            if not watch.open or sum(len(rows) for rows in watch.waiting) < count:
                continue
            before, watch.directions.count = watch.directions.components, count
            watch.directions.add(torch.cat(watch.waiting).to(torch.float32))
            watch.waiting.clear()
            now = watch.directions.components
            watch.found = torch.zeros(count, dtype=torch.bool)
            if before.numel():
                watch.found = (nn.functional.cosine_similarity(now, before) >= self.options.tau).cpu()
        if all(watch.directions.rows for watch in self.watches.values()):
            self.ranks = self._ranks()
            for leader, watch in self.watches.items():
                watch.open = not bool(watch.found[: self.ranks[leader]].all())
        return sum(not watch.open for watch in self.watches.values())

    def _ranks(self) -> dict[str, int]:
        """The budget of all ranks, given to the directions that hold the largest share of their layer's variance."""
        budget = sum(target.r for target in self.targets.values())
        shares = {name: self.watches[self.leaders[name]].directions.share[: self.most[name]] for name in self.targets}
        order = torch.cat([shares[name] for name in self.targets]).argsort(descending=True, stable=True)[:budget]
        owners = [name for name in self.targets for _ in range(len(shares[name]))]
        counts = Counter(owners[int(number)] for number in order)
        for name, leader in self.leaders.items():
            # Directions are checked on the leader, so none of its followers may have more of them.
            if counts[name] > counts[leader]:
                counts[name], counts[leader] = counts[leader], counts[name]
        return {name: counts[name] for name in self.targets}

    def result(self) -> dict[str, Tensor]:
        """The directions of every layer, as many as its rank."""
        found = {}
        for name, rank in self.ranks.items():
            directions = self.watches[self.leaders[name]].directions
            rows = directions.components[:rank].clone()
            if self.options.whiten:
                rows = rows / directions.singular_values[:rank].sqrt()[:, None]
            found[name] = rows
        return found


def _check_rows(target: Target) -> None:
    base = view(target.slot)
    if not base.linear_layer:
        raise ConfigError(
            f"init_lora_weights='eva' needs linear layers, and {target.slot.path!r} is a "
            f"{type(target.slot.module).__name__}; take it out of target_modules."
        )


def again_and_again(dataloader: Iterable[Any]) -> Iterator[Any]:
    for _ in range(PASSES):
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
        if empty:
            raise UsageError("EVA's dataloader has no batches, or cannot be gone through twice; pass a list or loader.")


def moved_to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: moved_to(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(moved_to(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


def _gathered(rows_ND: Tensor) -> Tensor:
    """The rows of all processes, which may differ in number."""
    sizes = [torch.zeros(1, dtype=torch.long, device=rows_ND.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows_ND)], device=rows_ND.device))
    longest = max(int(size) for size in sizes)
    padded = rows_ND.new_zeros(longest, rows_ND.shape[1])
    padded[: len(rows_ND)] = rows_ND
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
