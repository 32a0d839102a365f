"""The families of adapters that a run can train, and their fields: flags, run files and reference pages come from here.

A field that several families have in the same sense is one flag. It is refused for a family that does not have it.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from veneer.core.adalora_config import AdaLoraConfig
from veneer.core.config import LoraConfig, PeftConfig, TunerConfig, field_docs
from veneer.core.vera_config import VeraConfig

Family = Literal["lora", "adalora", "vera"]

FAMILIES: dict[str, type[TunerConfig]] = {"lora": LoraConfig, "adalora": AdaLoraConfig, "vera": VeraConfig}
"""The config of each family; DoRA and LoRA-FA are options of LoRA's."""

FAMILY = "family"
"""The field that chooses."""

_BOOKKEEPING = {f.name for f in dataclasses.fields(PeftConfig)}


@dataclass(frozen=True)
class AdapterField:
    """A field of one or more families' configs."""

    name: str
    hint: Any
    """Its type; of the first family that has it, with the choices of all."""
    default: Any
    """The value that it has when it is not given, in the first family that has it."""
    docs: str
    """Its line of docstring there."""
    families: dict[str, Any]
    """From the families that have it to its default there."""

    def shown_default(self) -> str:
        """The default for the help: empty when it says nothing, and with those of other families that differ."""
        if self.default is None or isinstance(self.default, dict):
            return ""
        others = {name: value for name, value in self.families.items() if value != self.default}
        more = "".join(f", {_text(value)} for {name}" for name, value in others.items())
        return _text(self.default) + more


@functools.cache
def adapter_fields() -> dict[str, AdapterField]:
    """The fields that say what the adapter is, by name: the family, and what its config is made of."""
    docs = f"What kind of adapter: {', '.join(FAMILIES)}. LoRA's options make it DoRA or LoRA-FA."
    found = {FAMILY: AdapterField(FAMILY, Family, "lora", docs, dict.fromkeys(FAMILIES, "lora"))}
    for family, config in FAMILIES.items():
        hints, lines = get_type_hints(config), field_docs(config)
        for f in dataclasses.fields(config):
            if f.name in _BOOKKEEPING | config.not_asked:
                continue
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            before = found.get(f.name)
            if before is None:
                found[f.name] = AdapterField(f.name, hints[f.name], default, lines[f.name], {family: default})
            else:
                hint = _both(before.hint, hints[f.name])
                found[f.name] = dataclasses.replace(before, hint=hint, families={**before.families, family: default})
    return found


def fields_of(family: str) -> tuple[str, ...]:
    """The names of a family's fields, without that which chooses it."""
    return tuple(name for name, field in adapter_fields().items() if family in field.families and name != FAMILY)


def _both(one: Any, other: Any) -> Any:
    """The choices of two fields in one; of other types the first stands for both."""
    if get_origin(one) is get_origin(other) is Literal:
        return Literal[tuple(dict.fromkeys((*get_args(one), *get_args(other))))]  # type: ignore[return-value]
    return one


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
