"""Results of another provenance are refused; records of earlier versions are read."""

import json
from pathlib import Path

import pytest

from utils.errors import InputError
from utils.files.provenance import differences, is_made, write_record, write_unfinished_record

PROVENANCE = {"seed": 42, "names": ["a", "b"]}


def test_differences_name_the_keys_of_both_sides() -> None:
    assert differences(found={"a": 1, "c": 3}, expected={"a": 1, "b": 2}) == [
        "b: found None, expected 2",
        "c: found 3, expected None",
    ]
    assert differences(found={"a": None}, expected={}) == []


def test_a_result_is_made_if_its_provenance_is_equal(tmp_path: Path) -> None:
    result = tmp_path / "x.npz"
    assert not is_made(result, PROVENANCE)
    write_record(result, PROVENANCE, figures={"bytes": 5, "psnr": 30.0})
    assert not is_made(result, PROVENANCE)
    result.write_text("12345")
    assert is_made(result, PROVENANCE)
    with pytest.raises(InputError, match=r"x\.npz: .*seed: found 42, expected 1;"):
        is_made(result, {**PROVENANCE, "seed": 1})
    with pytest.raises(InputError, match=r"x\.npz: .*names: found \['a', 'b'\], expected None;"):
        is_made(result, {"seed": 42})
    result.write_text("1234")
    with pytest.raises(InputError, match=r"x\.npz: exists, but .*x\.npz: found 4 bytes, expected 5"):
        is_made(result, PROVENANCE)


def test_a_result_is_made_if_its_files_are_as_recorded(tmp_path: Path) -> None:
    result, other = tmp_path / "x.npz", tmp_path / "more/y.png"
    other.parent.mkdir()
    result.write_text("12345")
    other.write_text("y")
    write_record(result, PROVENANCE, files=[result, other])
    assert is_made(result, PROVENANCE)
    for path, content, problem in (
        (result, "1234", "found 4 bytes, expected 5 bytes"),
        (result, "12346", r"found sha256 \w{12}\.\.\., expected \w{12}\.\.\."),
        (other, "z", "found sha256"),
        (other, None, "found no file, expected 1 bytes"),
    ):
        before = path.read_text()
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(InputError, match=rf"^{result}: exists, but {path}: {problem}.* as in .*x\.json; "):
            is_made(result, PROVENANCE)
        path.write_text(before)
    assert is_made(result, PROVENANCE)


def test_an_unfinished_result_is_made_again_by_the_same_command_only(tmp_path: Path) -> None:
    result = tmp_path / "x.npz"
    write_unfinished_record(result, PROVENANCE)
    assert not is_made(result, PROVENANCE)
    result.write_text("half")
    assert not is_made(result, PROVENANCE)
    with pytest.raises(InputError, match=r"x\.npz: .*seed: found 42, expected 1;"):
        is_made(result, {**PROVENANCE, "seed": 1})
    write_record(result, PROVENANCE, files=[result])
    assert is_made(result, PROVENANCE)


def test_the_key_of_earlier_versions(tmp_path: Path) -> None:
    (tmp_path / "x.npz").touch()
    (tmp_path / "x.json").write_text(json.dumps({"made_from": PROVENANCE}))
    assert is_made(tmp_path / "x.npz", PROVENANCE)


@pytest.mark.parametrize("content", [None, "[]", "{}", '{"provenance": 1}'])
def test_a_result_without_a_provenance_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "x.npz").touch()
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.npz: .*x\.json"):
        is_made(tmp_path / "x.npz", PROVENANCE)
