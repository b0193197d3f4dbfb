"""Folder to shards: what is inside, the same bytes after any kill and with any number of processes, named errors."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images.reading import open_images
from data.images.shard_index import index_path, read_index
from data.images.tar_shards import TarShards, find_shards
from scripts import make_shards
from tests.processes import run_script
from utils.errors import InputError
from utils.files.hashing import file_sha256


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Classes of 12, 4 and 2 images, in several formats; one name has dots, one is long and not ASCII."""
    rng = np.random.default_rng(0)
    for name, count in (("n01", 12), ("n02.x", 4), ("n03", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8))
            pixels.save(tmp_path / "images" / name / (f"a.v{i}.JPEG" if i % 2 else f"{'ü' * 80}{i}.png"))
    return tmp_path / "images"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make(images: Path, name: str, *options: str) -> dict[str, bytes]:
    make_shards.main([str(images), str(images.parent / name), "--samples-per-shard", "5", *options])
    return contents(images.parent / name)


def test_images_labels_and_names(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = make(images, "out", "--heldout", "0.3")
    assert "out: 13 images and 5 held out, of 3 classes, in 4 shards" in capsys.readouterr().out
    assert sorted(files) == [
        *("classes.json", "heldout-000000.index.npz", "heldout-000000.tar", "provenance.json", "shards.json"),
        *(f"train-{i:06d}.{suffix}" for i in range(3) for suffix in ("index.npz", "tar")),
    ]
    train, validation = (open_images(str(tmp_path / f"out/{split}-*.tar")) for split in ("train", "heldout"))
    assert train.class_names == ["n01", "n02.x", "n03"]
    assert np.bincount(validation.class_ids).tolist() == [3, 1, 1]
    assert np.bincount(train.class_ids).tolist() == [9, 3, 1]
    folder = open_images(str(images))
    original = {folder.read(i): folder.class_ids[i] for i in range(len(folder))}
    packed = {source.read(i): source.class_ids[i] for source in (train, validation) for i in range(len(source))}
    assert packed == original
    assert {key.split("/")[0] for key in map(train.key, range(len(train)))} == {"n01", "n02.x", "n03"}
    for name, record in json.loads(files["shards.json"]).items():
        path = tmp_path / "out" / name
        assert record == {
            "samples": len(TarShards(str(path))),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }


def test_webdataset_reads_them(images: Path, tmp_path: Path) -> None:
    import webdataset

    make(images, "out")
    samples = list(webdataset.WebDataset(str(tmp_path / "out/train-000000.tar"), shardshuffle=False))
    assert len(samples) == 5
    assert all(sample["cls"].isdigit() and {"jpeg", "png"} & set(sample) for sample in samples)


@pytest.mark.multiprocess
def test_kills_and_processes_change_nothing(images: Path, tmp_path: Path) -> None:
    expected = make(images, "one", "--processes", "1")
    assert make(images, "three", "--processes", "3") == expected
    command = ["scripts/make_shards.py", str(images), str(tmp_path / "killed")]
    command += ["--samples-per-shard", "5", "--processes", "1"]
    for fault in ("chunk.begin.0", "chunk.rename.1", "chunk.begin.3", "join.begin", "join.end"):
        assert run_script(command, tmp_path, REAR_FAULT=fault).returncode == -signal.SIGKILL
        assert not (tmp_path / "killed").exists()
    written = {path.name: path.stat().st_ino for path in (tmp_path / "killed.chunks/shards").glob("*.tar")}
    assert make(images, "killed") == expected
    assert {path.name: path.stat().st_ino for path in (tmp_path / "killed").glob("*.tar")} == written
    assert not (tmp_path / "killed.chunks").exists()

    (tmp_path / "killed.chunks").mkdir()  # as after a kill at the very end
    assert make(images, "killed") == expected
    assert not (tmp_path / "killed.chunks").exists()
    with pytest.raises(InputError, match="killed: exists with another provenance: "):
        make(images, "killed", "--heldout", "0.3")


def replace_pixels(path: Path) -> None:
    """Another image of the same name and size in bytes."""
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


def test_images_replaced_under_their_names_are_another_source(images: Path, tmp_path: Path) -> None:
    make(images, "out")
    replace_pixels(images / "n03/a.v1.JPEG")
    with pytest.raises(InputError, match=r"out: exists with another provenance: sizes and times of the images: found"):
        make(images, "out")


def test_a_damaged_shard_is_not_complete(images: Path, tmp_path: Path) -> None:
    expected = make(images, "out")
    cut = tmp_path / "out/train-000001.tar"
    cut.write_bytes(expected[cut.name][:-1024])
    with pytest.raises(InputError, match=rf"{cut}: found \d+ bytes, expected {len(expected[cut.name])} bytes"):
        make(images, "out")
    cut.unlink()
    with pytest.raises(InputError, match=rf"out: exists, but {cut}: found no file, expected"):
        make(images, "out")
    command = ["scripts/make_shards.py", str(images), str(tmp_path / "killed"), "--samples-per-shard", "5"]
    assert run_script(command, tmp_path, REAR_FAULT="join.begin").returncode == -signal.SIGKILL
    chunks = tmp_path / "killed.chunks"
    (chunks / "shards/train-000001.tar").write_bytes(b"cut")
    (chunks / "shards/train-000002.index.npz").unlink()
    (chunks / "000000000003.json").write_text("{")
    assert make(images, "killed") == expected


def test_class_names_from_a_file(images: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("n02.x tench, Tinca tinca\nn01 goldfish\n\n")
    with pytest.raises(InputError, match=r"names\.txt: found no line for 1 class folders, such as n03"):
        make(images, "out", "--class-names", str(names))
    names.write_text(names.read_text() + "n03\n")
    make(images, "out", "--class-names", str(names))
    assert open_images(str(tmp_path / "out/*.tar")).class_names == ["goldfish", "tench, Tinca tinca", "n03"]
    with pytest.raises(InputError, match="cannot be read"):
        make(images, "out2", "--class-names", str(tmp_path / "nothing.txt"))


def test_errors(images: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"there: exists, but .*holds no provenance"):
        make(images, "there")
    with pytest.raises(InputError, match="nothing: no such folder"):
        make(tmp_path / "nothing", "out")
    (images / "n01/x.png").touch()
    with pytest.raises(InputError, match=r"x\.png: found an empty file"):
        make(images, "out")
    assert not (tmp_path / "out").exists()
    (images / "n01/x.png").rename(images / "n01/a_v1.png")
    with pytest.raises(InputError, match=r"out\.chunks: .*names of the images: found \w+, expected"):
        make(images, "out")
    with pytest.raises(InputError, match="has the same key 'n01/a_v1' as "):
        make(images, "out3")
    with pytest.raises(SystemExit):
        make(images, "out", "--heldout", "1")
    for prefix in ("heldout", "heldout-more", "../out", "a/b", "a*", "{a}", ""):  # held out, lost or matching others
        with pytest.raises(SystemExit):
            make(images, "out", "--prefix", prefix)
    with pytest.raises(InputError, match="found in the folder of the images"):
        make_shards.main([str(images), str(images / "out")])
    for arguments in ([], [str(images)], [str(images), "out", "--index", "x.tar"], [str(images), "--index", "x.tar"]):
        with pytest.raises(SystemExit):
            make_shards.main(arguments)


def test_shards_from_elsewhere_get_the_same_indices(images: Path, tmp_path: Path) -> None:
    make(images, "out")
    pattern = str(tmp_path / "out/train-*.tar")
    of_writer = {path: read_index(path) for path in find_shards(pattern)}
    for path in of_writer:
        index_path(path).unlink()
    with_headers = TarShards(pattern)
    make_shards.main(["--index", pattern])
    for path, expected in of_writer.items():
        for column in ("keys", "class_ids", "offsets", "sizes"):
            np.testing.assert_array_equal(getattr(read_index(path), column), getattr(expected, column))
    assert TarShards(pattern).fingerprint == with_headers.fingerprint
    with pytest.raises(InputError, match=r"nothing-\*\.tar: no such shard"):
        make_shards.main(["--index", str(tmp_path / "nothing-*.tar")])


def test_readers_compare_sizes_and_hashes(images: Path, tmp_path: Path) -> None:
    make(images, "out")
    pattern, counts = str(tmp_path / "out/*.tar"), tmp_path / "out/shards.json"
    before = TarShards(pattern).fingerprint
    records = json.loads(counts.read_text())
    records["train-000001.tar"]["sha256"] = "0" * 64
    counts.write_text(json.dumps(records))
    with pytest.raises(
        InputError, match=r"train-000001\.index\.npz: found the index of a shard of sha256 .* 000000000000"
    ):
        TarShards(pattern)
    (tmp_path / "out/train-000001.index.npz").unlink()
    assert TarShards(pattern).fingerprint != before
    records["train-000001.tar"]["bytes"] += 1
    counts.write_text(json.dumps(records))
    with pytest.raises(InputError, match=r"train-000001\.tar: found \d+ bytes, expected \d+ as in .*shards\.json"):
        TarShards(pattern)
