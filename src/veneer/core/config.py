"""LoraConfig: PEFT's fields, names, defaults and file, read strictly.

A field that PEFT has and this release does not build is accepted at its default and refused otherwise,
so that no option is ever ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from veneer.core import registry
from veneer.core.errors import AdapterFileError, ConfigError, nearest
from veneer.core.hub import CONFIG_NAME, WHERE, locate
from veneer.core.task_type import TaskType

PEFT_FORMAT = "0.21.2"
"""The PEFT release whose file format and field list this module follows."""

_VENEER_TASK = "veneer_task_type"

# Fields of PEFT's LoraConfig that nothing here implements yet, with the only value that is accepted.
_NOT_BUILT: dict[str, Any] = {
    "runtime_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "monteclora_config": None,
    "layer_replication": None,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}

# PEFT keeps these out of its file: they say how this machine runs the adapter.
_NOT_SAVED = frozenset({"runtime_config"})

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
            if value != cls.not_built[name]:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"{name}={value!r} is a PEFT option that this release of veneer does not support; "
                    f"leave it at {cls.not_built[name]!r}."  # type: ignore[attr-defined]
                )
            del given[name]
        make(self, **given)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


@strict
@dataclass(kw_only=True)
class PeftConfig:
    """The fields that every adapter's config has, whatever its variant.

    ``PeftConfig.from_pretrained(folder)`` gives the config of the variant that the file names.
    """

    not_built: ClassVar[Mapping[str, Any]] = {}
    variant: ClassVar[str] = ""

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
        if self.task_type is not None:
            self.task_type = TaskType(self.task_type)

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
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(self.to_json() + "\n", encoding="utf-8")

    def to_json(self) -> str:
        """The text of ``adapter_config.json``."""
        return json.dumps({**self.to_dict(), "inference_mode": True}, indent=2, sort_keys=True)


@strict
@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    """Low-rank adaptation of frozen weights: ``W x + s B A x`` (Hu et al., arXiv 2106.09685).

    Fields, names, defaults and meaning are PEFT's.

    >>> config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])

    Raises:
        ConfigError: an unknown field (the nearest is named), an unsupported one, or a bad value.
    """

    not_built: ClassVar[Mapping[str, Any]] = _NOT_BUILT
    variant: ClassVar[str] = "lora"

    peft_type: str | None = "LORA"
    """The variant family in PEFT's spelling."""
    r: int = 8
    """The rank of the update."""
    target_modules: list[str] | str | None = None
    """Names (exact or suffix), one regular expression, "all-linear", or None for the model type's default."""
    exclude_modules: list[str] | str | None = None
    """Names or one regular expression to leave out of the targets."""
    lora_alpha: int | float = 8
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """The probability of dropping an input of A during training."""
    fan_in_fan_out: bool = False
    """Whether targets store their weight as (in, out); found from the layer itself, kept for PEFT's file."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained: none, all, or those of the adapted layers."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    modules_to_save: list[str] | None = None
    """Modules that are trained and saved whole, beside the adapter."""
    init_lora_weights: bool | str = True
    """How A and B start: true (kaiming A, zero B), "gaussian", or false (both random)."""
    layers_to_transform: list[int] | int | None = None
    """Only these layer indices are adapted."""
    layers_pattern: list[str] | str | None = None
    """The name of the list of layers that the indices count in, when it is not obvious."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """A rank for the modules whose name ends in the given name or regular expression."""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """A lora_alpha for the modules whose name ends in the given name or regular expression."""
    lora_bias: bool = False
    """Whether B has a bias that learns."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if str(self.peft_type).upper() != "LORA":
            raise ConfigError(f"LoraConfig has peft_type LORA, not {self.peft_type!r}.")
        self.peft_type = "LORA"
        _positive_int("r", self.r)
        _positive("lora_alpha", self.lora_alpha)
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout!r}; expected a number from 0 to below 1.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(
                f"bias is {self.bias!r}; expected none, all or lora_only."
                f"{nearest(str(self.bias), ['none', 'all', 'lora_only'])}"
            )
        for name in ("fan_in_fan_out", "use_rslora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected true or false.")
        self._check_names()
        self._check_layers()
        self._check_patterns()
        if not isinstance(self.init_lora_weights, bool):
            key = str(self.init_lora_weights)
            if key not in registry.names("inits"):
                raise ConfigError(
                    f"init_lora_weights is {key!r}; expected true, false or one of "
                    f"{', '.join(registry.names('inits'))}.{nearest(key, registry.names('inits'))}"
                )

    @property
    def init(self) -> str:
        """The key of the start: the file in ``inits/``."""
        named = {True: "kaiming", False: "random"}
        return named[self.init_lora_weights] if isinstance(self.init_lora_weights, bool) else self.init_lora_weights

    def _check_names(self) -> None:
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save is the text {self.modules_to_save!r}; expected a list of names: "
                f"[{self.modules_to_save!r}]."
            )
        saved = _names("modules_to_save", self.modules_to_save)
        self.modules_to_save = saved if isinstance(saved, list) else None

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            if self.layers_pattern:
                raise ConfigError("layers_pattern is set without layers_to_transform; say which layers are meant.")
            return
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            raise ConfigError(
                "layers_to_transform works with target_modules as a list; with a regular expression, "
                "put the layer numbers into the expression."
            )
        for index in layers if isinstance(layers, list) else [layers]:
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise ConfigError(f"layers_to_transform has {index!r}; expected layer numbers from 0.")

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if patterns is None:
                setattr(self, name, {})
                continue
            if not isinstance(patterns, dict):
                raise ConfigError(f"{name} is {patterns!r}; expected a mapping from module name to number.")
            for key, value in patterns.items():
                _regex(name, key)
                if name == "rank_pattern":
                    _positive_int(f"rank_pattern[{key!r}]", value)
                else:
                    _positive(f"alpha_pattern[{key!r}]", value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        AdapterFileError: not UTF-8, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not readable as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} holds a JSON {type(values).__name__}; expected an object with fields.")
    return values


def _config_class(peft_type: str, source: str) -> type[PeftConfig]:
    known = registry.names("variants")
    if peft_type.lower() not in known:
        raise ConfigError(
            f"{source} has peft_type {peft_type!r}, which this release does not support; "
            f"supported: {', '.join(name.upper() for name in known)}."
        )
    found: type[PeftConfig] = registry.load("variants", peft_type.lower()).Variant.config_class
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value


def _names(field_name: str, value: Any) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            raise ConfigError(f"{field_name} is an empty text; expected names or a regular expression.")
        _regex(field_name, value)
        return value
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(v, str) and v for v in value):
        raise ConfigError(f"{field_name} is {value!r}; expected a list of module names.")
    if not value and field_name == "target_modules":
        raise ConfigError("target_modules is an empty list; name at least one module, or leave it out.")
    return sorted(value) if isinstance(value, set | frozenset) else list(dict.fromkeys(value))


def _regex(field_name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{field_name} has {pattern!r}, which is not a regular expression: {error}.") from None


def _positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least 1.")


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {value!r}; expected a number above 0.")


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
