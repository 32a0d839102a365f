"""Which variant can be on which base, found by adapting the contract's modules: for the README and the reference."""

from __future__ import annotations

from torch import Tensor, nn

import veneer
from tests.contract import test_contract as contract
from tests.contract.bases import CASES
from veneer.core import registry
from veneer.core.errors import ConfigError

NAMES = {
    "linear": "`nn.Linear`",
    "conv1d": "transformers' `Conv1D`",
    "embedding": "`nn.Embedding`",
    "conv": "`nn.Conv1d`, `2d`, `3d`",
    "attention": "`nn.MultiheadAttention`",
    "parameter": "expert and other bare parameters",
    "bnb_4bit": "bitsandbytes 4-bit",
    "bnb_8bit": "bitsandbytes 8-bit",
    "quantised": "other quantised linear layers",
}
"""What readers call a base; its file name where there is nothing better."""
HEADINGS = {"lora": "LoRA", "dora": "DoRA", "adalora": "AdaLoRA", "vera": "VeRA", "alora": "aLoRA", "qalora": "QALoRA"}


class _OfTokens(nn.Module):
    """A model of one layer that could say which tokens it was called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(input_ids)


def reason(variant: str, base: str, case: str) -> str | None:
    """Why a variant cannot be on a module, or None."""
    model, _, found = contract.base_model(base, case, contract.DTYPES[0])
    try:
        veneer.get_peft_model(_OfTokens(model.layer), contract.fitted(contract.config(variant), found))
    except ConfigError as refused:
        return str(refused)
    return None


def rows() -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, one row a base, and the reasons that the rows refer to by number."""
    variants = sorted(registry.names("variants"), key=lambda name: [*HEADINGS, name].index(name))
    reasons: list[str] = []
    made = []
    for base in sorted(CASES, key=lambda name: [*NAMES, name].index(name)):
        cells = [NAMES.get(base, base)]
        for variant in variants:
            found = {case: reason(variant, base, case) for case in CASES[base]}
            refused = [text for text in found.values() if text is not None]
            if not refused:
                cells.append("yes")
                continue
            if refused[0] not in reasons:
                reasons.append(refused[0])
            number = reasons.index(refused[0]) + 1
            cells.append(f"no ({number})" if len(refused) == len(found) else f"in part ({number})")
        made.append(cells)
    return ["", *(HEADINGS.get(name, name) for name in variants)], made, reasons
