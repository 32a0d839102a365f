"""Texts as vectors: how a model's token vectors become one, how near two are, and what is nearest to a text.

Shape legend: N texts, T tokens, D dimensions, A anchors, C candidates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Way = Literal["mean", "cls", "last"]
"""One vector for a text: the mean of its tokens', or that of its first or last token."""

SCALE = 20.0
"""What cosines are multiplied by before they are compared: sentence-transformers' temperature of 0.05."""

_MOST = 2**24
"""How many cosines are held at once."""

_MODES: dict[str, Way] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "last",
}


def pooled(states_NTD: Tensor, mask_NT: Tensor, way: Way) -> Tensor:
    """One vector of length 1 for each text, (N, D); padding does not count, on whichever side it is.

    >>> pooled(torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]]), torch.tensor([[1, 0, 0]]), "mean")
    tensor([[1., 0.]])

    Args:
        states_NTD: what the model's last layer gives.
        mask_NT: 1 for tokens, 0 for padding.
        way: how the vectors of tokens become one.
    """
    if way == "mean":
        weights = mask_NT.unsqueeze(-1).to(states_NTD.dtype)
        vectors = (states_NTD * weights).sum(1) / weights.sum(1)
    else:
        last = mask_NT.shape[1] - 1 - mask_NT.flip(-1).argmax(-1)
        places = last if way == "last" else mask_NT.argmax(-1)
        vectors = states_NTD[torch.arange(len(places), device=places.device), places]
    return F.normalize(vectors, dim=-1)


def way_of(config: PretrainedConfig | None) -> Way:
    """How a model wants its tokens' vectors to become one: as sentence-transformers wrote beside it, else their mean.

    Raises:
        ConfigError: in another way than those of ``Way``.
    """
    from transformers.utils import cached_file

    name = getattr(config, "name_or_path", "")
    quietly = {
        f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")
    }
    found = cached_file(name, "config.json", subfolder="1_Pooling", **quietly) if name else None
    if found is None:
        return "mean"
    values = json.loads(Path(found).read_text(encoding="utf-8"))
    modes = [key for key, on in values.items() if key.startswith("pooling_mode_") and on is True]
    modes = modes or [str(values.get("pooling_mode"))]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise ConfigError(
            f"{found} asks for {', '.join(modes)}, which is not among those that can be computed; give --pooling mean, "
            "cls or last."
        )
    return _MODES[modes[0]]


def compared(anchors_AD: Tensor, candidates_CD: Tensor, said_A: Tensor, said_C: Tensor, first: int) -> Tensor:
    """Cosines times ``SCALE``, (A, C): anchors against candidates, of which number ``first + a`` is the right one.

    A candidate that says the same as the anchor, or as the right one, is no wrong answer: it counts as -inf.

    Args:
        anchors_AD: vectors of length 1.
        candidates_CD: the same, of what may be right.
        said_A: a number for what each anchor says, equal where the text is.
        said_C: the same of candidates.
        first: which candidate is right for the first anchor.
    """
    each = torch.arange(len(anchors_AD), device=anchors_AD.device)
    right_A1 = said_C[first : first + len(anchors_AD), None]
    same_AC = (said_C[None] == said_A[:, None]) | (said_C[None] == right_A1)
    same_AC[each, first + each] = False
    return (SCALE * anchors_AD @ candidates_CD.T).masked_fill(same_AC, -torch.inf)


@final
@dataclass(frozen=True)
class Ranking:
    """How anchors find what belongs to them among many candidates."""

    losses: Tensor
    """(A,) float32, the cross entropy of each anchor, in nats."""
    ranks: Tensor
    """(A,) int64, the place of the right candidate, counted from 1; of those that are equally near, the last."""

    @property
    def figures(self) -> dict[str, float]:
        """``recall_at_1``, ``recall_at_10`` and ``mrr``, the mean of 1 / rank."""
        ranks = self.ranks.double()
        recalls = {f"recall_at_{k}": float((ranks <= k).double().mean()) for k in (1, 10)}
        return {**recalls, "mrr": float((1 / ranks).mean())}


def ranking(anchors_AD: Tensor, candidates_CD: Tensor, said_A: Tensor, said_C: Tensor) -> Ranking:
    """Anchors among all candidates, of which the first A are the right ones, in the same order; see ``compared``."""
    size = max(1, _MOST // max(1, len(candidates_CD)))
    losses, ranks = [], []
    for first in range(0, len(anchors_AD), size):
        rows = slice(first, first + size)
        near_AC = compared(anchors_AD[rows], candidates_CD, said_A[rows], said_C, first)
        right_A = torch.arange(first, first + len(near_AC), device=near_AC.device)
        losses.append(F.cross_entropy(near_AC, right_A, reduction="none"))
        ranks.append((near_AC >= near_AC.gather(1, right_A[:, None])).sum(1))
    return Ranking(torch.cat(losses), torch.cat(ranks))


def numbered(texts: Iterable[object], known: dict[object, int]) -> Tensor:
    """A number for what each text says, (N,) int64; ``known`` has those of earlier calls and takes the new ones."""
    return torch.tensor([known.setdefault(text, len(known)) for text in texts], dtype=torch.int64)
