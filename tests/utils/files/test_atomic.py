"""A name exists only when its file or folder is complete; an error changes nothing."""

import errno
from pathlib import Path

import pytest

from utils.files import atomic
from utils.files.atomic import atomic_file, atomic_folder, write_text, write_text_once


def test_a_file_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        write_half(partial)
    with pytest.raises(FileNotFoundError), atomic_file(path):
        pass  # nothing written
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_the_first_of_several_writers_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_hard_links: bool
) -> None:
    """On a mount without hard links, a file is written, too."""

    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "not supported", str(source))

    if not has_hard_links:
        monkeypatch.setattr(atomic.os, "link", link)
    path = tmp_path / "plan.json"
    write_text_once(path, "first")
    assert path.read_text() == "first"
    if has_hard_links:
        write_text_once(path, "second")
        assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp/of a killed run").touch()
    with atomic_folder(tmp_path / "a") as partial:
        assert list(partial.iterdir()) == []
        (partial / "inside").mkdir()
        (partial / "inside/file").write_text("new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a/inside/file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_an_error_leaves_no_folder_and_none_is_replaced(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as partial:
        write_half(partial / "file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a/of somebody").touch()
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "a") as partial:
        (partial / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "of somebody"]


def test_all_is_flushed_to_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr("utils.files.atomic.sync", lambda path: events.append((path.name, (tmp_path / "a").exists())))
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "file").touch()
    assert events == [("file", False), ("a.tmp", False), (tmp_path.name, True)]
