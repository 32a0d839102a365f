"""What every adapter's config has, and how configs are read: strictly, in PEFT's spelling.

A field that PEFT has and this release does not build is accepted at its default and refused otherwise,
so that no option is ever ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from veneer.core import registry
from veneer.core.disk import write_text
from veneer.core.errors import AdapterFileError, ConfigError, nearest
from veneer.core.hub import CONFIG_NAME, WHERE, locate
from veneer.core.not_built import is_off
from veneer.core.task_type import TaskType

PEFT_FORMAT = "0.21.2"
"""The PEFT release whose file format and field list this module follows."""

_VENEER_TASK = "veneer_task_type"

# Kept out of the file: they say how this machine runs or trains the adapter, not what it is.
_NOT_SAVED = frozenset({"runtime_config", "use_lorafa"})

C = TypeVar("C", bound=type)


def strict(cls: C) -> C:
    """A class decorator over a dataclass: unknown keywords are named with their nearest match.

    Keywords of ``cls.not_built`` are accepted at their one value and refused at any other.
    """
    make = cls.__init__  # type: ignore[misc]
    known = {f.name for f in dataclasses.fields(cls)}

    @functools.wraps(make)
    def checked(self: Any, **given: Any) -> None:
        for name, value in list(given.items()):
            if name in known:
                continue
            if name not in cls.not_built:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"{cls.__name__} has no field {name!r}.{nearest(name, known | set(cls.not_built))}"  # type: ignore[attr-defined]
                )
            accepted = cls.not_built[name]  # type: ignore[attr-defined]
            if not is_off(value, accepted):
                why = cls.reasons.get(name, "it is not built.")  # type: ignore[attr-defined]
                raise ConfigError(f"{name}={value!r} is not supported, only {accepted!r}: {why}")
            del given[name]
        make(self, **given)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@strict
@dataclass(kw_only=True)
class PeftConfig:
    """The fields that every adapter's config has, whatever its variant. Abstract.

    ``PeftConfig.from_pretrained(folder)`` gives the config of the variant that the file names.
    """

    not_built: ClassVar[Mapping[str, Any]] = {}
    reasons: ClassVar[Mapping[str, str]] = {}
    not_in_file: ClassVar[frozenset[str]] = frozenset()
    not_asked: ClassVar[frozenset[str]] = frozenset()

    task_type: TaskType | str | None = None
    """What the model is for; decides whether its head is trained and saved."""
    peft_type: str | None = None
    """The variant family in PEFT's spelling, e.g. LORA."""
    auto_mapping: dict[str, Any] | None = None
    """Class and library of the base model, written for models that are not from a known task."""
    peft_version: str | None = None
    """The PEFT release whose format the file follows."""
    base_model_name_or_path: str | None = None
    """Where the base model's weights are."""
    revision: str | None = None
    """The base model's revision on the hub."""
    inference_mode: bool = False
    """Whether the adapter is loaded frozen."""

    def __post_init__(self) -> None:
        if type(self).peft_type is None:
            raise TypeError(f"{type(self).__name__} is abstract; use the config of a variant, such as LoraConfig.")
        own = type(self).peft_type
        if str(self.peft_type).upper() != own:
            raise ConfigError(f"{type(self).__name__} has peft_type {own}, not {self.peft_type!r}.")
        self.peft_type = own
        if self.task_type is not None:
            # PEFT's own enumeration is taken by its value.
            self.task_type = TaskType(self.task_type.value if isinstance(self.task_type, Enum) else self.task_type)
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                setattr(self, name, os.fspath(value))
            elif value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} is {value!r}; expected a text.")
        if self.auto_mapping is not None and not isinstance(self.auto_mapping, dict):
            raise ConfigError(f"auto_mapping is {self.auto_mapping!r}; expected a mapping.")
        require_bool("inference_mode", self.inference_mode)

    @property
    def is_prompt_learning(self) -> bool:
        """Always false: kept because transformers' Trainer asks."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Always false: kept because public scripts ask."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, in the spelling that PEFT reads, keys sorted."""
        values: dict[str, Any] = {key: value for key, value in self.not_built.items() if key not in _NOT_SAVED}
        for f in dataclasses.fields(self):
            if f.name not in _NOT_SAVED | self.not_in_file:
                values[f.name] = _plain(getattr(self, f.name))
        values["peft_version"] = PEFT_FORMAT
        if isinstance(self.task_type, TaskType):
            values["task_type"] = self.task_type.peft_name
            if self.task_type.peft_name is None:
                values["auto_mapping"] = {**(self.auto_mapping or {}), _VENEER_TASK: self.task_type.value}
        return dict(sorted(values.items()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "the given dict") -> PeftConfig:
        """The config that ``values`` describes, of the class that its ``peft_type`` names.

        A key unknown to this release is refused, unless its value is null, false or empty: then the
        option that it stands for is off.

        Raises:
            ConfigError: an unknown or unsupported key, or a bad value.
        """
        peft_type = str(values.get("peft_type") or "LORA").upper()
        wanted = _config_class(peft_type, source)
        known = {f.name for f in dataclasses.fields(wanted)} | set(wanted.not_built)
        given = {}
        for key, value in values.items():
            if key in known:
                given[key] = value
            elif value not in (None, False, [], {}, ""):
                raise ConfigError(
                    f"{source} sets {key}={value!r}, which {wanted.__name__} does not know.{nearest(key, known)}"
                )
        mapping = given.get("auto_mapping")
        if isinstance(mapping, dict) and _VENEER_TASK in mapping:
            given["task_type"] = mapping[_VENEER_TASK]
            given["auto_mapping"] = {k: v for k, v in mapping.items() if k != _VENEER_TASK} or None
        return wanted(**given)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> PeftConfig:
        """Read ``adapter_config.json`` from a folder or, when online, from the hub.

        Args:
            pretrained_model_name_or_path: an adapter folder or a hub name.
            kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir`` and ``local_files_only`` say where
                to look; any other keyword overrides a field of the file.
        """
        where = {key: kwargs.pop(key) for key in list(kwargs) if key in WHERE}
        path = locate(pretrained_model_name_or_path, CONFIG_NAME, **where)
        return cls.from_dict({**read_json(path), **kwargs}, source=str(path))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``adapter_config.json`` into a folder, which is created when missing."""
        write_text(Path(save_directory) / CONFIG_NAME, self.to_json() + "\n")

    def to_json(self) -> str:
        """The text of ``adapter_config.json``."""
        return json.dumps({**self.to_dict(), "inference_mode": True}, indent=2, sort_keys=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AdapterFileError: unreadable, not UTF-8, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise AdapterFileError(f"{path} is not readable as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} holds a JSON {type(values).__name__}; expected an object with fields.")
    return values


def _config_class(peft_type: str, source: str) -> type[PeftConfig]:
    known = config_classes()
    if peft_type not in known:
        raise ConfigError(
            f"{source} has peft_type {peft_type!r}, which this release does not support; "
            f"supported: {', '.join(known)}.{nearest(peft_type, known)}"
        )
    return known[peft_type]


@functools.cache
def config_classes() -> dict[str, type[PeftConfig]]:
    """The config class of every ``peft_type``, found from the variants there are."""
    found = [registry.load("variants", name).Variant.config_class for name in registry.names("variants")]
    return {cls.peft_type: cls for cls in sorted(found, key=lambda cls: cls.peft_type)}


def require_bool(name: str, value: Any) -> None:
    """Refuse anything but true and false as the value of a field.

    Raises:
        ConfigError: neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected true or false.")


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def field_docs(cls: type) -> dict[str, str]:
    """The docstring line under each field of a dataclass or pydantic model, its parents' included.

    The command line's help and the reference pages are made from it.
    """
    import ast
    import inspect
    import textwrap

    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if owner.__module__ == "builtins" or not hasattr(owner, "__annotations__"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError):
            continue
        assert isinstance(tree.body[0], ast.ClassDef)
        body = tree.body[0].body
        for item, after in itertools.pairwise(body):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[item.target.id] = inspect.cleandoc(str(after.value.value))
    return docs
