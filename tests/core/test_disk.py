"""Files are whole or not there, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from veneer import DiskError
from veneer.core.disk import write_folder, write_text, write_whole


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def full(path: Path) -> None:
    path.write_text("half of i")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_writes_and_replaces(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    write_whole(folder, {"one": text("1"), "two": text("2")})
    write_whole(folder, {"one": text("new")})
    assert contents(folder) == {"one": "new", "two": "2"}


@pytest.mark.parametrize("position", [0, 1, 2])
def test_full_disk_leaves_what_was_there(position: int, tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    write_whole(tmp_path, {name: text("old") for name in names})
    writers = {name: full if number == position else text("new") for number, name in enumerate(names)}
    with pytest.raises(DiskError, match="No space left"):
        write_whole(tmp_path, writers)
    assert contents(tmp_path) == dict.fromkeys(names, "old")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_other_failures_pass_through_and_leave_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def stop(path: Path) -> None:
        path.write_text("x")
        raise error

    with pytest.raises(error):
        write_whole(tmp_path, {"one": text("new"), "two": stop})
    assert contents(tmp_path) == {}


def test_folder_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("old")
    (tmp_path / "two").mkdir()
    with pytest.raises(DiskError, match="unchanged"):
        write_whole(tmp_path, {"one": text("new"), "two": text("new")})
    assert (tmp_path / "one").read_text() == "old"


def test_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError):
        write_text(tmp_path / "file" / "inside.txt", "y")


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()

    def private(path: Path) -> None:
        path.write_bytes(b"x")
        path.chmod(0o600)

    write_whole(tmp_path, {"private": private})
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def good(folder: Path) -> int:
        (folder / "inside").mkdir()
        (folder / "inside" / "a").write_text("new")
        return 7

    assert write_folder(tmp_path / "made" / "out", good) == 7
    assert (tmp_path / "made" / "out" / "inside" / "a").read_text() == "new"
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_a_folder_that_fails_leaves_what_was_there(tmp_path: Path, error: BaseException, there: bool) -> None:
    if there:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("old")

    def bad(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise error

    with pytest.raises(DiskError if isinstance(error, OSError) else type(error)):
        write_folder(tmp_path / "out", bad, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there else [])
    assert not there or (tmp_path / "out" / "a").read_text() == "old"


def test_a_folder_that_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    with pytest.raises(DiskError, match="File exists"):
        write_folder(tmp_path / "out", lambda folder: (folder / "b").write_text("new"))
    assert (tmp_path / "out" / "a").read_text() == "old"
    write_folder(tmp_path / "out", lambda folder: (folder / "b").write_text("new"), replace=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_reason_of_a_file_inside_is_the_folders(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"Could not write '\S*/out': No space left on device; nothing was left"):
        write_folder(tmp_path / "out", lambda folder: write_whole(folder, {"a": full}))
