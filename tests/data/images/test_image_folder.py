"""Folders of images: which files count, in which order, and the notices about the others."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data.images.image_folder import ImageFolder, is_plain
from data.images.reading import open_images
from data.images.tar_shards import TarShards
from scripts import make_shards
from utils.errors import InputError


def fill(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {".gif": "GIF", ".tif": "TIFF", ".bmp": "BMP"}.get(Path(name).suffix, "PNG")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name, kind)
    return root


def test_all_that_pillow_reads_in_nested_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = fill(tmp_path, "a/2.bmp", "a/1.gif", "a/deep/er/3.TIF", "a/x.jfif", "b/1.png")
    source = open_images(str(root))
    assert list(map(source.key, range(5))) == ["a/1.gif", "a/2.bmp", "a/deep/er/3.TIF", "a/x.jfif", "b/1.png"]
    assert source.class_ids.tolist() == [0, 0, 0, 0, 1]
    assert all(source[i][0].size == (8, 8) for i in range(5))
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = fill(tmp_path, "a/1.png", "loose.png")
    for name in ("a/notes.txt", "a/more.txt", "a/film.mp4"):
        (root / name).write_text("no image")
    assert len(ImageFolder(root)) == 1
    said = capsys.readouterr().err
    assert f"{root}: skipped 3 files (no image), such as a/" in said
    assert f"{root}: skipped 1 files (next to the class folders), such as loose.png" in said


def test_names_with_a_dot_first_are_no_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = fill(tmp_path, "a/1.png", "a/._1.png", "a/.ipynb_checkpoints/1.png", ".git/2.png")
    source = ImageFolder(root)
    assert (len(source), source.class_names) == (1, ["a"])
    assert capsys.readouterr().err == ""


def test_folders_of_a_system_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    added = ("@eaDir", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".Trash-1000")
    root = fill(tmp_path, "a/1.png", "b/1.png", "b/@eaDir/1.png/SYNOPHOTO_THUMB_M.png", *(f"{x}/9.png" for x in added))
    source = ImageFolder(root)
    assert (source.class_names, [source.key(i) for i in range(2)]) == (["a", "b"], ["a/1.png", "b/1.png"])
    assert len(source) == 2
    fill(root, "plain/1.png", "plain/@eaDir/1.png")
    assert is_plain(root / "plain")
    with tarfile.open(root / "x.tar", "w") as tar:
        (root / "1.cls").write_text("0")
        for name, file in (("1.png", "a/1.png"), ("1.cls", "1.cls"), ("@eaDir/1.png", "a/1.png")):
            tar.add(root / file, name)
    assert len(open_images(str(root / "x.tar"))) == 1


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["train/a/1.png", "val/a/1.png"], "found the folders train, val, which are splits"),
        (["train/1.png", "Test/1.png", "extra/1.png"], "found the folders Test, train, which are splits"),
        (["test/a/1.png", ".git/1.png", "@eaDir/1.png"], "found the folders test, which are splits"),
        (["data/a/1.png", "data/b/1.png"], "data: found no image nearer than a/1.png, expected at most 0"),
        (["x/train/a/1.png", "y/1.png"], "x: found no image nearer than train/a/1.png, expected at most 1"),
    ],
)
def test_folders_that_are_no_classes_are_named(tmp_path: Path, files: list[str], found: str) -> None:
    root = fill(tmp_path / "images", *files)
    with pytest.raises(InputError, match=f"^{root}.*{found}"):
        make_shards.main([str(root), str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_folders_that_look_odd_and_are_classes(tmp_path: Path) -> None:
    root = fill(tmp_path, "train/1.png", "bus/old/1.png", "car/1.png", "car/deep/er/2.png")
    assert ImageFolder(root).class_names == ["bus", "car", "train"]


def test_folders_that_are_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    root = fill(tmp_path, *(f"{i}/1.png" for i in range(12)))
    assert ImageFolder(root).class_names == list(map(str, range(12)))
    fill(root, "other/1.png")
    assert ImageFolder(root).class_names[:3] == ["0", "1", "10"]


def test_any_bytes_as_names(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = fill(tmp_path / "images", "a/1.png", "a/2.png")
    os.rename(os.fsencode(root / "a/2.png"), os.fsencode(root / "a") + b"/\xff.png")
    os.rename(root / "a", os.fsencode(root) + b"/caf\xe9")
    source = ImageFolder(root)
    assert source.class_names == ["caf\\xe9"]
    assert [source[i][0].getpixel((0, 0))[0] for i in range(2)] == [0, 1]
    assert source.location(1) == f"{root}/caf\\xe9/\\xff.png"
    make_shards.main([str(root), str(tmp_path / "shards")])
    for _ in range(2):  # with the index, and from the headers
        shards = open_images(str(tmp_path / "shards/*.tar"))
        assert sorted(map(shards.key, range(2))) == ["caf\udce9/1", "caf\udce9/\udcff"]
        assert shards.class_names == ["caf\\xe9"]
        assert r"\xff" in "".join(map(shards.location, range(2)))
        assert len(shards.fingerprint) == 64
        (tmp_path / "shards/train-000000.index.npz").unlink(missing_ok=True)


def test_a_folder_called_by_a_format_holds_images(tmp_path: Path) -> None:
    source = open_images(str(fill(tmp_path / "images", "a/jpg/1.png", "a/png/2.png", "a/PNG", "b/3.png")))
    assert [source.key(index) for index in range(len(source))] == ["a/jpg/1.png", "a/png/2.png", "b/3.png"]


@pytest.mark.parametrize("kind", ["link to nowhere", "folder"])
def test_what_looks_like_an_image_but_cannot_be_read(tmp_path: Path, kind: str) -> None:
    root = fill(tmp_path / "images", "a/1.png")
    bad = root / "a/2.jpg"
    if kind == "folder":
        bad.mkdir()
    else:
        bad.symlink_to("nowhere.jpg")
    source = open_images(str(root))
    with pytest.raises(InputError, match=r"a/2\.jpg: cannot be read: (Is a directory|No such file)"):
        source[1]
    with pytest.raises(InputError, match=r"a/2\.jpg: cannot be read"):
        make_shards.main([str(root), str(tmp_path / "out"), "--processes", "1"])
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_folder_around_it_ends(tmp_path: Path) -> None:
    root = fill(tmp_path, "a/1.png")
    (root / "a/again").symlink_to(root / "a")
    assert len(ImageFolder(root)) == 1


def test_validation_classes_are_matched_by_name(tmp_path: Path) -> None:
    source = ImageFolder(fill(tmp_path, "bird/1.png", "dog/1.png"))
    source.name_classes(["ant", "bird", "cat", "dog"], "train")
    assert source.class_ids.tolist() == [1, 3]
    assert source.class_names == ["ant", "bird", "cat", "dog"]
    with pytest.raises(InputError, match=r"1 class names that train lacks or has twice, such as 'dog'"):
        ImageFolder(tmp_path).name_classes(["ant", "bird", "cat"], "train")


def test_shards_of_different_classes_are_refused(tmp_path: Path) -> None:
    for name, classes in (("x", "ab"), ("y", "ac")):
        make_shards.main(
            [str(fill(tmp_path / name, *(f"{c}/{name}.png" for c in classes))), str(tmp_path / f"shards/{name}")]
        )
    with pytest.raises(InputError, match=r"y/classes\.json: found other class names than in .*x/classes\.json"):
        open_images(str(tmp_path / "shards/*/*.tar"))
    (tmp_path / "shards/y/classes.json").write_text(json.dumps(["a", "b"]))
    assert len(open_images(str(tmp_path / "shards/*/*.tar"))) == 4


def test_at_least_one_of_each_class_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = fill(tmp_path / "images", *(f"{c}/{i}.png" for c in "abc" for i in range(5)))
    make_shards.main([str(root), str(tmp_path / "out"), "--heldout", "0.1"])
    assert "12 images and 3 held out" in capsys.readouterr().out
    assert sorted(TarShards(str(tmp_path / "out/heldout-*.tar")).class_ids) == [0, 1, 2]
    fill(root, "d/1.png")
    with pytest.raises(InputError, match="found 1 image of class 'd', expected at least 2"):
        make_shards.main([str(root), str(tmp_path / "more"), "--heldout", "0.1"])
