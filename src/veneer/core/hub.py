"""Where the files of a named adapter are: a local folder first, the hub only when online."""

from __future__ import annotations

from pathlib import Path

from veneer.core.errors import AdapterFileError, UsageError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
WHERE = ("subfolder", "revision", "token", "cache_dir", "local_files_only")
"""The options that say where to look for an adapter's files."""


def locate(
    name: str | Path,
    filename: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The path of one file of an adapter.

    A folder on disk is read as it is, and nothing else is asked. Otherwise ``name`` is a hub name such as
    ``someone/adapter``: its files come from the local cache or, unless ``HF_HUB_OFFLINE`` is set, from the hub.

    Raises:
        UsageError: no such folder and no such file on the hub, or the hub is out of reach.
        AdapterFileError: the file is a symbolic link to somewhere outside of the folder.
    """
    try:
        folder = Path(name).expanduser()
    except RuntimeError:
        # "~someone" without such a user.
        folder = Path(name)
    if folder.is_dir():
        path = folder / subfolder / filename if subfolder else folder / filename
        if path.is_file():
            _stay_inside(path, folder)
            return path
        raise UsageError(f"{path.parent} has no {filename}; expected a folder that save_pretrained wrote.")
    if folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise UsageError(f"There is no folder {str(name)!r}.")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            hf_hub_download(
                str(name),
                filename,
                subfolder=subfolder,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise UsageError(
            f"There is no folder {str(name)!r}, and the hub is out of reach or switched off, with no copy of its "
            f"{filename} in the cache."
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UsageError(
            f"There is no folder {str(name)!r}, and the hub gave no {filename} for it: {first_line}"
        ) from None


def _stay_inside(path: Path, folder: Path) -> None:
    """Refuse a link out of the folder, but for those of the hub's cache, whose snapshots are links to its blobs."""
    target, home = path.resolve(), folder.resolve()
    caches = [place.parent / "blobs" for place in (home, *home.parents) if place.name == "snapshots"]
    if not any(target.is_relative_to(place) for place in (home, *caches)):
        raise AdapterFileError(
            f"{path} is a symbolic link to {target}, outside of its folder; put the file itself there to load it."
        )
