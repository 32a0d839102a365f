"""Modules that are trained whole beside an adapter, such as a new classification head."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor, nn

from veneer.adapters.routing import Router
from veneer.core.errors import UsageError


@final
class ModulesToSaveWrapper(nn.Module):
    """The original module and one trained copy for each adapter, under PEFT's names."""

    def __init__(self, original_module: nn.Module, router: Router) -> None:
        super().__init__()
        self.router = router
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.training = original_module.training

    @property
    def current(self) -> nn.Module:
        """The copy in use, or the original."""
        return self.original_module if self.active is None else self.modules_to_save[self.active]

    def module_for(self, name: str) -> nn.Module:
        """An adapter's copy; the original where it has none."""
        return self.modules_to_save[name] if name in self.modules_to_save else self.original_module  # noqa: SIM401 - a ModuleDict has no get

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.router.idle:
            routing = self.router.current
            if routing is not None:
                return routing.through_whole(self, args, kwargs)
            self.router.check_told()
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}) or name.startswith("__"):
                raise
            found = getattr(self.current, name)
            if self.router.current is not None and isinstance(found, Tensor):
                raise UsageError(
                    f"adapter_names cannot choose between the copies of this {type(self.current).__name__}: the model "
                    f"reads its {name} instead of calling it; run the adapters one after the other."
                ) from None
            return found
