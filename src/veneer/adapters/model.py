"""The facade with PEFT's public names: ``get_peft_model`` and ``PeftModel``."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from veneer.adapters import combine, files, lifecycle, status
from veneer.adapters import convert as conversion
from veneer.adapters import merge as merging
from veneer.adapters.adapted import AdaptedModel
from veneer.adapters.index import lies_in, shape_of
from veneer.adapters.inject import check_name, inject
from veneer.adapters.loading import load_into
from veneer.adapters.trainer import apparent_class, forward_like, leave_for_trainer, with_base
from veneer.core.base import Into
from veneer.core.config import PeftConfig
from veneer.core.errors import UsageError, nearest
from veneer.core.hub import WHERE
from veneer.core.records import ApproximatedLayer, MatchReport

# Options that public scripts pass to PEFT, where they do nothing either.
_WITHOUT_EFFECT = {
    "device_map": "its tensors go where the layers they belong to are",
    "torch_dtype": "it keeps the dtype of its file, or float32 with autocast_adapter_dtype",
    "dtype": "it keeps the dtype of its file, or float32 with autocast_adapter_dtype",
}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt a model: its parameters are frozen, and a fresh adapter's learn.

    >>> model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    >>> model.print_trainable_parameters()

    Args:
        model: any torch module; it is changed in place.
        peft_config: what to adapt and how; it is not changed (the resolved one is ``model.peft_config[name]``).
        adapter_name: the adapter's name.
        autocast_adapter_dtype: keep the adapter in float32 on a float16 or bfloat16 base.
        revision: the base model's revision, for the record.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device, to be loaded later.

    Raises:
        TargetError: a pattern of the config matches nothing or nothing that can be adapted.
        UsageError: the model is adapted already.
    """
    if isinstance(model, PeftModel):
        raise UsageError("This model is a PeftModel already; use add_adapter on it.")
    peft_model = PeftModel(model)
    adapted = peft_model.base_model
    config = with_base(peft_config, model, revision)
    inject(
        adapted,
        adapter_name,
        config,
        autocast_adapter_dtype=autocast_adapter_dtype,
        device="meta" if low_cpu_mem_usage else None,
    )
    lifecycle.activate(adapted, adapter_name, trainable=not config.inference_mode)
    peft_model._prepare_checkpointing()
    return peft_model


@final
class PeftModel(nn.Module):
    """A model with adapters. Every attribute of the wrapped model is reachable through it.

    Made by ``get_peft_model`` or ``PeftModel.from_pretrained``. To ``isinstance`` it passes for the class of
    the wrapped model (and for ``peft.PeftModel`` once that package is imported), because transformers'
    Trainer decides by class how to save and resume.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = AdaptedModel(model)
        self.training = model.training
        self._take_signature()

    # Making and loading

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **where: Any,
    ) -> PeftModel:
        """Load a saved adapter onto a base model, which is put into eval mode unless it is to be trained.

        Args:
            model: the base model; changed in place, and left as it was when loading fails.
            model_id: an adapter folder, or a hub name when online.
            adapter_name: the name to give it.
            is_trainable: whether its parameters learn.
            config: used instead of the folder's ``adapter_config.json``.
            autocast_adapter_dtype: keep a float16 or bfloat16 adapter in float32.
            low_cpu_mem_usage: accepted as PEFT's option; tensors are always loaded without being made first.
            where: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            UsageError: no such adapter.
            AdapterFileError: a broken file, or one that does not fit the model.
        """
        peft_model = cls(model)
        peft_model.load_adapter(
            model_id,
            adapter_name,
            is_trainable=is_trainable,
            config=config,
            autocast_adapter_dtype=autocast_adapter_dtype,
            **where,
        )
        lifecycle.activate(peft_model.base_model, adapter_name, trainable=is_trainable)
        if not is_trainable:
            peft_model.eval()
        peft_model._prepare_checkpointing()
        return peft_model

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Add a fresh adapter, which is not active yet. After a failure the model is what it was.

        Raises:
            UsageError: the name is taken.
            TargetError: see ``get_peft_model``.
        """
        inject(
            self.base_model,
            adapter_name,
            with_base(peft_config, self.get_base_model(), None),
            autocast_adapter_dtype=autocast_adapter_dtype,
            device="meta" if low_cpu_mem_usage else None,
        )

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        config: PeftConfig | None = None,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **where: Any,
    ) -> MatchReport:
        """Load one more adapter, which is not active yet.

        A name that is taken is refused. Two things are filled in place instead, so that an optimiser keeps its
        parameters: an adapter made with ``low_cpu_mem_usage``, and one whose checkpoint transformers' Trainer loads.

        Args:
            model_id: an adapter folder, or a hub name when online.
            adapter_name: the name to give it.
            is_trainable: whether its parameters learn.
            config: used instead of the folder's own.
            torch_device: accepted as PEFT's option; tensors go where the layer they belong to is.
            autocast_adapter_dtype: keep a float16 or bfloat16 adapter in float32.
            low_cpu_mem_usage: accepted as PEFT's option; tensors are always loaded without being made first.
            where: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Returns:
            What the adapter is on.

        Raises:
            UsageError: no such adapter, or the name is taken.
            AdapterFileError: a broken file, or one that does not fit the model, which is left as it was.
        """
        for option in [key for key in where if key in _WITHOUT_EFFECT]:
            del where[option]
            warnings.warn(f"{option} has no effect on loading an adapter: {_WITHOUT_EFFECT[option]}.", stacklevel=2)
        for option in set(where) - set(WHERE):
            raise UsageError(f"load_adapter has no option {option!r}.{nearest(option, WHERE)}")
        return load_into(
            self.base_model,
            adapter_name,
            files.read(model_id, config, **where),
            trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        *,
        as_plain_lora: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        tokenizer: Any = None,
        figures: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters in PEFT's format: "default" into the folder itself, others into folders of their name.

        Args:
            save_directory: created when missing; an adapter that stands there is replaced as a whole.
            safe_serialization: must stay True; pickles are not written.
            selected_adapters: names to save, all when None.
            save_embedding_layers: also write the base's embeddings; "auto" when the vocabulary was resized.
            is_main_process: other processes of a distributed run write nothing.
            path_initial_model_for_weight_conversion: PEFT's word for ``as_plain_lora``; the folder is not needed.
            as_plain_lora: write what started from a part of W (PiSSA and its kind) as LoRA of W, at twice the rank.
            state_dict: the gathered state dict of a sharded model.
            tokenizer: anything with ``save_pretrained``, saved beside the adapter.
            figures: lines for the model card.
            kwargs: accepted for callers that pass the options of other models' ``save_pretrained``.

        Raises:
            UsageError: an unknown adapter, ``safe_serialization=False``, or an update that is no plain LoRA.
            DiskError: the disk is full or not writable; what stood there before still stands.
        """
        if not safe_serialization:
            raise UsageError("safe_serialization=False asks for a pickle; veneer writes safetensors only.")
        if not is_main_process:
            return
        folder = Path(save_directory)
        for name in selected_adapters if selected_adapters is not None else self.peft_config:
            self.base_model.require(name)
            place = folder if name == "default" else folder / name
            if as_plain_lora or path_initial_model_for_weight_conversion is not None:
                if state_dict is not None:
                    raise UsageError("as_plain_lora needs the model's own tensors; leave state_dict out.")
                plain = conversion.convert(self.base_model, name)
                conversion.save(place, self.base_model, name, plain.config, plain.tensors, figures=dict(figures or {}))
                continue
            files.save(
                self.base_model,
                name,
                place,
                save_embedding_layers=save_embedding_layers,
                state_dict=state_dict,
                figures=figures,
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        leave_for_trainer(folder)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Kept because transformers' Trainer calls it after writing its own card, which stands as it is."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> tuple[ApproximatedLayer, ...]:
        """Add an inactive adapter that is a weighted combination of others; see ``veneer.adapters.combine``.

        >>> model.add_weighted_adapter(["first", "second"], [0.7, 0.3], "both", combination_type="cat")

        Raises:
            UsageError: the combination has no meaning. The model is what it was.
        """
        options = (svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)
        return combine.add_weighted_adapter(
            self.base_model, adapters, weights, adapter_name, combination_type, *options
        )

    # Switching

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several whose updates add up; all others become inactive.

        Raises:
            UsageError: an unknown name, or two adapters that cannot be active together.
        """
        lifecycle.activate(self.base_model, adapter_name, trainable=not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of these adapters learn, or not; those of all others stay as they are.

        Raises:
            UsageError: an unknown name.
        """
        lifecycle.set_requires_grad(self.base_model, adapter_names, requires_grad)

    def rename_adapter(self, old_name: str, new_name: str) -> None:
        """Give an adapter another name; its tensors stay the same objects.

        Raises:
            UsageError: no adapter of the old name, or the new one is taken or no name.
        """
        check_name(new_name)
        lifecycle.rename(self.base_model, old_name, new_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not active.

        Raises:
            UsageError: an unknown name, or an active adapter (``unload()`` gives the base model back).
        """
        lifecycle.delete(self.base_model, adapter_name)

    @contextmanager
    def adapter(self, *adapter_names: str) -> Iterator[None]:
        """These adapters alone for the length of a ``with`` block; what was active, enabled and merged comes back.

        >>> with model.adapter("reference"), torch.no_grad():
        ...     logits = model(**batch).logits

        Which parameters learn does not change; see ``set_requires_grad``.

        Raises:
            UsageError: see ``set_adapter``.
        """
        with lifecycle.using(self.base_model, adapter_names):
            yield

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone, for the length of a ``with`` block: also its own heads and biases."""
        with lifecycle.disabled(self.base_model):
            yield

    # Merging

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, into: Into | None = None
    ) -> None:
        """Merge the active adapters, or those named, into the weights, so that they cost nothing.

        ``into`` says what quantised layers become; see ``merge_and_unload``.

        Raises:
            UsageError, MergeError: see ``veneer.adapters.merge.merge``.
        """
        merging.merge(self.base_model, adapter_names, safe_merge=safe_merge, into=into)

    def unmerge_adapter(self) -> None:
        """Take every merged adapter out again; the weights are the very tensors they were."""
        merging.unmerge(self.base_model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        into: Into | None = None,
    ) -> nn.Module:
        """Merge the active adapters for good and return the base model, free of wrappers.

        Args:
            progressbar: accepted as PEFT's option; merging reports nothing.
            safe_merge: check first that every merged weight is finite.
            adapter_names: adapters to merge instead of the active ones.
            into: what quantised layers become: plain ("dequantised"), or quantised again with the loss that this
                means ("requantised"). Without it, merging into them is refused.
        """
        adapted = self.base_model
        wanted = dict.fromkeys(
            [*merging.merged_names(adapted), *(adapted.active_adapters if adapter_names is None else adapter_names)]
        )
        return merging.unload(adapted, merged=list(wanted), safe_merge=safe_merge, into=into)

    def unload(self) -> nn.Module:
        """Drop all adapters and return the base model as it was."""
        return merging.unload(self.base_model, merged=[])

    # Looking

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of every adapter, by name."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the names when there are several."""
        active = self.base_model.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> str | None:
        """The variant family of the first active adapter."""
        return self.active_peft_config.peft_type

    @property
    def match_report(self) -> MatchReport:
        """What the first active adapter's config matched."""
        return self.base_model.reports[self.active_adapters[0]]

    def get_base_model(self) -> nn.Module:
        """The wrapped model, with the adapters in it."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters of the model in use.

        Originals that stand unused behind a trained copy (``modules_to_save``) are not counted.
        """
        index = self.base_model.index
        copied = [path for path, wrapper in self.base_model.saved.items() if wrapper.active is not None]
        unused = {
            id(parameter)
            for path, slot in index.slots.items()
            if lies_in(path, copied) and all(lies_in(other, copied) for other in index.tied.get(path, ()))
            for parameter in slot.module._parameters.values()
        }
        counted = [parameter for parameter in self.parameters() if id(parameter) not in unused]
        sizes = [(math.prod(shape_of(p)), p.requires_grad) for p in counted]
        return sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The state of every module that holds adapters; see ``veneer.get_layer_status``."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """The state of all adapters together; see ``veneer.get_model_status``."""
        return status.get_model_status(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters learn, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    # Being the wrapped model

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Tells transformers that a quantised base can be trained: adapters are attached."""
        return True

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        base_model = self.__dict__.get("_modules", {}).get("base_model")
        return PeftModel if base_model is None else apparent_class(base_model.model)

    def _get_name(self) -> str:
        return "PeftModel"

    def _take_signature(self) -> None:
        self.__dict__["forward"] = types.MethodType(forward_like(type(self.base_model.model)), self)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._take_signature()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (), self.__getstate__()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_model = self.__dict__.get("_modules", {}).get("base_model")
            if base_model is None or name.startswith("__"):
                raise
            return getattr(base_model, name)

    def _prepare_checkpointing(self) -> None:
        """Let gradients enter through frozen embeddings when checkpointing was switched on beforehand."""
        if self.base_model.index.checkpointing and hasattr(self.get_base_model(), "enable_input_require_grads"):
            self.get_base_model().enable_input_require_grads()  # type: ignore[operator]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``torch.nn.Module.load_state_dict``; also takes one adapter's tensors, keyed as in its file.

        The latter go into the active adapter: that is how transformers' Trainer resumes without PEFT installed.
        """
        active = self.base_model.active_adapters
        own = files.adapter_state(self.base_model, active[0], packed=False) if len(active) == 1 else {}
        if own.keys() != state_dict.keys() or any(own[key].shape != state_dict[key].shape for key in own):
            return super().load_state_dict(state_dict, strict, assign)
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(state_dict[key])
        return nn.modules.module._IncompatibleKeys([], [])


def _blank() -> PeftModel:
    return PeftModel.__new__(PeftModel)
