"""The loss of a language model without its logits: head and cross entropy over the supervised tokens, in chunks.

The model runs as ever, but where it would call its output head, the loss is computed from what the head would have
been given. So no more than one chunk of logits exists at a time. What a model does to its logits behind the head
(gemma caps, granite divides, cohere multiplies) is found by looking: a head that answers with known numbers shows it.

Shape legend: B rows, T tokens, P positions whose logits are needed, N supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.adapters.model import PeftModel
from veneer.kernels.cross_entropy import linear_cross_entropy

IGNORED = -100
"""The label of a token that is not supervised; torch's cross entropy skips it."""
Reduction = Literal["sum", "none"]

CHUNK = 256
"""Tokens whose logits exist at a time: enough for a fast product, and 50 MB at a vocabulary of 49,152."""


@dataclass(frozen=True)
class HeadForm:
    """What a model does to its head's output: ``cap * tanh(scale * x / cap)``, without the cap ``scale * x``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.scale == 1.0 else x * self.scale
        return x if self.cap is None else torch.tanh(x / self.cap) * self.cap


@dataclass(frozen=True)
class HeadLoss:
    """The loss over the supervised tokens of a batch."""

    total: Tensor
    """Its sum, a scalar with a graph behind it where gradients are on; without reduction (N,), each token's own."""
    units: int
    """N, the number of supervised tokens."""
    correct: int
    """How many of them the first choice got right; counted only while gradients are off."""


_forms: weakref.WeakKeyDictionary[nn.Module, HeadForm | None] = weakref.WeakKeyDictionary()
"""From a head to what its model does behind it; None where that is something else."""


def language_loss(
    model: nn.Module, inputs: dict[str, Any], labels_BT: Tensor, reduction: Reduction = "sum"
) -> HeadLoss:
    """The summed cross entropy of a causal language model, each supervised token predicted from those before it.

    >>> language_loss(model, {"input_ids": ids}, labels).total.backward()

    Args:
        model: a transformers model with a language head, adapted, wrapped for several processes, or plain.
        inputs: its arguments without labels.
        labels_BT: token ids, ``-100`` where not supervised; the first of a row is never supervised.
        reduction: "none" gives each supervised token's own, row by row.
    """
    targets_BT = labels_BT[:, 1:]
    # Positions that no row is supervised at need no logits: the head is much of a small model.
    needed_P = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    targets_BP = targets_BT[:, needed_P]
    supervised = targets_BP != IGNORED
    targets_N = targets_BP[supervised]
    bare = underlying(model)
    selects = "logits_to_keep" in inspect.signature(bare.forward).parameters
    inputs = {**inputs, "use_cache": False, **({"logits_to_keep": needed_P} if selects else {})}

    def chosen(x: Tensor) -> Tensor:
        return (x if selects else x[:, needed_P])[supervised]

    head = output_head(bare)
    form = None if head is None else form_of(bare)
    if head is None or form is None:
        return _of_logits(chosen(model(**inputs).logits), targets_N, reduction)
    found: list[HeadLoss] = []
    project = head.forward
    split = is_split(model) or _is_wrapped(model)

    def instead(x: Tensor) -> Tensor:
        found.append(_of_hidden(chosen(x), head, project, form, targets_N, reduction))
        # No logits. Those of a split model have the loss behind them, see below.
        return x[..., :0].detach() + found[0].total.sum() if split else x[..., :0]

    with _answering(head, instead):
        nothing = model(**inputs).logits
    if not split:
        return found[0]
    # It adds zero. But a split model is put together for the backward pass when a gradient comes to its output.
    return dataclasses.replace(found[0], total=found[0].total + nothing.sum())


def form_of(model: nn.Module) -> HeadForm | None:
    """What a model does to its logits; found once by running it on one token, and then remembered.

    Args:
        model: as for ``language_loss``, before it is spread over processes.

    Returns:
        None where it has no output head, is an encoder-decoder, or does something that is not understood: then its
        own logits are used.
    """
    bare = underlying(model)
    head = output_head(bare)
    if head is None or bare.config.is_encoder_decoder:  # type: ignore[union-attr]
        return None
    if head not in _forms:
        _forms[head] = _look(bare, head)
    return _forms[head]


def underlying(model: nn.Module) -> nn.Module:
    """The transformers model inside adapters and wrappers of several processes."""
    while isinstance(inner := model._modules.get("module"), nn.Module):
        model = inner
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_split(model: nn.Module) -> bool:
    """Whether the parameters of a transformers model, adapted or not, are split over several processes by FSDP2."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(underlying(model), FSDPModule)


def _is_wrapped(model: nn.Module) -> bool:
    """Whether a model is in a wrapper, such as DeepSpeed's engine, other than DDP, which looks at parameters alone."""
    return "module" in model._modules and not isinstance(model, nn.parallel.DistributedDataParallel)


def output_head(model: Any) -> nn.Module | None:
    """The module that makes logits of hidden states."""
    found: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found


def _look(model: nn.Module, head: nn.Module) -> HeadForm | None:
    weight: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    # Large enough for a cap to show, irregular enough that nothing else passes for a factor.
    known = (torch.linspace(-40, 40, vocabulary, device=weight.device).sin() * 40)[None, None].to(weight.dtype)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _answering(head, lambda x: known.expand(*x.shape[:-1], vocabulary)):
            ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
            seen = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(was_training)
    if seen.shape[-1] != vocabulary:
        return None
    return next(
        (form for form in _candidates(model, known[0, 0], seen[0, 0]) if _is(form, known[0, 0], seen[0, 0])), None
    )


def _candidates(model: nn.Module, known: Tensor, seen: Tensor) -> Iterator[HeadForm]:
    yield HeadForm()
    largest = known.abs().argmax()
    yield HeadForm(scale=float(seen[largest] / known[largest]))
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # type: ignore[union-attr,operator]
    if cap:
        yield HeadForm(cap=float(cap))


def _is(form: HeadForm, known: Tensor, seen: Tensor) -> bool:
    tolerance = 1e-5 if known.dtype == torch.float32 else 2e-2
    return torch.allclose(form(known.float()), seen.float(), rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def _answering(module: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a module answer with something else than its own output."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = answer
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def _of_hidden(
    h_ND: Tensor,
    head: nn.Module,
    project: Callable[[Tensor], Tensor],
    form: HeadForm,
    targets_N: Tensor,
    reduction: Reduction,
) -> HeadLoss:
    if not targets_N.numel():
        # A process that has nothing to do in this step still goes backward with the others.
        return HeadLoss(h_ND.float().sum(-1 if reduction == "none" else None) * 0.0, 0, 0)
    chunks = list(zip(h_ND.split(CHUNK), targets_N.split(CHUNK), strict=True))
    join: Callable[[list[Tensor]], Tensor] = torch.cat if reduction == "none" else _sum
    if not torch.is_grad_enabled():
        found = [_of_logits(form(project(h)), targets, reduction) for h, targets in chunks]
        return HeadLoss(join([one.total for one in found]), targets_N.numel(), sum(one.correct for one in found))
    if reduction == "sum" and _is_frozen(head, h_ND):
        weights: Any = head.weight, head.bias
        total = linear_cross_entropy(h_ND, *weights, targets_N, scale=form.scale, cap=form.cap, chunk=CHUNK)
        return HeadLoss(total, targets_N.numel(), 0)
    if reduction == "sum" and form.cap is None and _is_plain(head) and not torch.is_autocast_enabled(h_ND.device.type):
        h_ND = h_ND if form.scale == 1.0 else h_ND * form.scale
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None)
        bias: Any = head.bias if head.bias is None or form.scale == 1.0 else head.bias * form.scale
        total = F.linear_cross_entropy(h_ND, head.weight, targets_N, linear_bias=bias, reduction="sum", options=options)
        return HeadLoss(total, targets_N.numel(), 0)

    def part(h: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(form(project(h).float()), targets, reduction=reduction)

    # An adapted or quantised head computes its logits once more in the backward pass instead of keeping them.
    parts = [checkpoint(part, h, targets, use_reentrant=False) for h, targets in chunks]
    return HeadLoss(join(parts), targets_N.numel(), 0)


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum()


def _of_logits(logits_NV: Tensor, targets_N: Tensor, reduction: Reduction) -> HeadLoss:
    total = F.cross_entropy(logits_NV.float(), targets_N, reduction=reduction)
    correct = 0 if torch.is_grad_enabled() else int((logits_NV.argmax(-1) == targets_N).sum())
    return HeadLoss(total, targets_N.numel(), correct)


def _is_plain(head: nn.Module) -> bool:
    """Whether the head is a product with its weight and nothing else, wide enough to be summed as it is."""
    return _is_bare(head) and head.weight.dtype in (torch.float32, torch.float64)


def _is_frozen(head: nn.Module, h_ND: Tensor) -> bool:
    """Whether the head is a product with a frozen weight of half precision, which is also its input's."""
    return (
        _is_bare(head)
        and h_ND.dtype == head.weight.dtype in (torch.bfloat16, torch.float16)
        and not any(parameter.requires_grad for parameter in head.parameters())
    )


def _is_bare(head: nn.Module) -> bool:
    hooks = head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks
    return type(head) is nn.Linear and not any(hooks)
