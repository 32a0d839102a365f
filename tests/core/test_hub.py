"""Where an adapter's files are looked for: a folder first, and the hub only when it may be asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer import UsageError
from veneer.core.hub import CONFIG_NAME, locate


def test_a_folder_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        (folder / CONFIG_NAME).write_text("{}")
    assert locate(tmp_path, CONFIG_NAME) == tmp_path / CONFIG_NAME
    assert locate(str(tmp_path), CONFIG_NAME, subfolder="sub") == tmp_path / "sub" / CONFIG_NAME
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/sub", CONFIG_NAME) == tmp_path / "sub" / CONFIG_NAME


@pytest.mark.parametrize(
    "name",
    ["/no/such/folder", "./none", "../none", "~/none", "~nobody-of-that-name/x", "a/b/c", "a\0b", "", "none", "a/b"],
)
def test_what_is_not_there_is_one_usage_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError):
        locate(name, CONFIG_NAME)


def test_a_copy_in_the_cache_is_used_offline(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / CONFIG_NAME).write_text("{}")
    refs = tmp_path / "models--someone--adapter" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    found = locate("someone/adapter", CONFIG_NAME, cache_dir=tmp_path)
    assert found.read_text() == "{}"
    with pytest.raises(UsageError, match="out of reach"):
        locate("someone/adapter", CONFIG_NAME, cache_dir=tmp_path, revision="other")
