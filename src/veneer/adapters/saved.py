"""Modules that are trained whole beside an adapter, such as a new classification head."""

from __future__ import annotations

from typing import Any, final

from torch import nn


@final
class ModulesToSaveWrapper(nn.Module):
    """The original module and one trained copy for each adapter, under PEFT's names."""

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.training = original_module.training

    @property
    def current(self) -> nn.Module:
        """The copy in use, or the original."""
        return self.original_module if self.active is None else self.modules_to_save[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}) or name.startswith("__"):
                raise
            return getattr(self.current, name)
