"""Biases of the base model that an adapter trains (``bias="all"`` or ``"lora_only"``).

They live in the base's own parameters, as in PEFT. The original values are kept, so that switching,
disabling or deleting an adapter gives the base back exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn


@final
class BiasBank:
    """The values of every trained bias: as they were, and as each adapter has them."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[nn.Module, str]] = {}
        self.original: dict[str, Tensor] = {}
        self.trained: dict[str, dict[str, Tensor]] = {}
        self.shown: str | None = None

    def parameter(self, key: str) -> nn.Parameter:
        """The live parameter of a bias."""
        module, leaf = self.places[key]
        parameter = module._parameters[leaf]
        assert parameter is not None
        return parameter

    def add(self, name: str, places: dict[str, tuple[nn.Module, str]], base: Mapping[str, Tensor]) -> None:
        """Register an adapter's biases; their values start as ``base``, those of the untouched model."""
        for key, place in places.items():
            if key not in self.places:
                self.places[key] = place
                self.original[key] = base[key].detach().clone()
        self.trained[name] = {key: self.original[key].clone() for key in places}

    def show(self, name: str | None) -> None:
        """Put the values of one adapter, or the original ones, into the model."""
        if name == self.shown:
            return
        with torch.no_grad():
            if self.shown is not None:
                for key in self.trained[self.shown]:
                    self.trained[self.shown][key] = self.parameter(key).detach().clone()
                    self.parameter(key).copy_(self.original[key])
            if name is not None:
                for key, value in self.trained[name].items():
                    self.parameter(key).copy_(value)
        self.shown = name

    def values(self, name: str) -> dict[str, Tensor]:
        """An adapter's biases, wherever they are at the moment."""
        if name == self.shown:
            return {key: self.parameter(key) for key in self.trained[name]}
        return self.trained[name]

    def rename(self, old: str, new: str) -> None:
        """Keep an adapter's biases under another name."""
        if old in self.trained:
            self.trained = {new if name == old else name: values for name, values in self.trained.items()}
            self.shown = new if self.shown == old else self.shown

    def remove(self, name: str) -> None:
        """Forget an adapter's biases; the base's own come back when they were shown."""
        if self.shown == name:
            self.show(None)
        for key in self.trained.pop(name, {}):
            if not any(key in values for values in self.trained.values()):
                self.parameter(key).requires_grad_(False)
                del self.places[key], self.original[key]

    def settle(self) -> None:
        """Leave the values that are shown in the model for good."""
        self.shown = None
        self.trained.clear()
