"""The families of adapters by PEFT's names, and configs from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum
from typing import Any

from veneer.core import registry
from veneer.core.peft_config import PeftConfig


def _families() -> dict[str, str]:
    configs = (registry.load("variants", name).Variant.config_class for name in registry.names("variants"))
    names = sorted({str(f.default) for config in configs for f in fields(config) if f.name == "peft_type"})
    return {name: name for name in names}


PeftType = StrEnum("PeftType", _families())  # type: ignore[misc]
"""What ``peft_type`` of a config may be: ``PeftType.LORA == "LORA"``. One member for every family of variants."""


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The config that plain values describe, of the class that their ``peft_type`` names.

    >>> get_peft_config({"peft_type": "LORA", "r": 4})

    Raises:
        ConfigError: an unknown type or field, or a bad value.
    """
    return PeftConfig.from_dict(config_dict)
