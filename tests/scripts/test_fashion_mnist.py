"""Fashion-MNIST's files to shards and folders; on few made-up images, and in a slow test on Debian's package."""

import gzip
import hashlib
import os
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.images import fashion_mnist
from data.images.fashion_mnist import CLASS_NAMES
from data.images.image_folder import ImageFolder
from data.images.tar_shards import TarShards
from scripts.fashion_mnist import main
from utils.errors import InputError

COUNTS = {"train": 60, "t10k": 20}


@pytest.fixture
def pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Made-up files where torchvision leaves them, below <tmp_path>/data; returns their images."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/FashionMNIST/raw"
    folder.mkdir(parents=True)
    images, hashes = {}, {}
    for number, (name, count) in enumerate(COUNTS.items()):
        images[name] = np.random.default_rng(number).integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, header, array in (
            ("images-idx3", struct.pack(">4I", 0x803, count, 28, 28), images[name]),
            ("labels-idx1", struct.pack(">2I", 0x801, count), labels),
        ):
            content = header + array.tobytes()
            hashes[f"{name}-{kind}-ubyte"] = hashlib.sha256(content).hexdigest()
            (folder / f"{name}-{kind}-ubyte").write_bytes(content)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(fashion_mnist, "SHA256", hashes)
    monkeypatch.setattr(fashion_mnist, "IMAGES_PER_SHARD", 40)
    return images


def check(source: ImageFolder | TarShards, images: np.ndarray) -> None:
    assert Counter(source.class_ids.tolist()) == dict.fromkeys(range(10), len(images) // 10)
    for index in range(len(source)):
        image, class_id = source[index]
        number = int(Path(source.key(index)).stem)
        found = np.asarray(image)
        assert class_id == number % 10
        assert found.shape == (32, 32, 3)
        assert (found[2:30, 2:30] == images[number][:, :, None]).all()
        assert found.sum() == 3 * images[number].sum(dtype=int)  # the border is black


def test_shards(pixels: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["out/shards"])
    names = ["heldout-000000", "train-000000", "train-000001"]
    files = {
        "classes.json",
        "shards.json",
        "provenance.json",
        *(f"{name}.tar" for name in names),
        *(f"{name}.index.npz" for name in names),
    }
    assert {path.name for path in Path("out/shards").iterdir()} == files
    train, heldout = (TarShards(f"out/shards/{name}-*.tar") for name in ("train", "heldout"))
    assert train.class_names == heldout.class_names == CLASS_NAMES
    check(train, pixels["train"])
    check(heldout, pixels["t10k"])
    assert "data/FashionMNIST/raw" in capsys.readouterr().out
    before = Path("out/shards/shards.json").stat().st_mtime_ns
    main(["out/shards"])
    assert Path("out/shards/shards.json").stat().st_mtime_ns == before
    Path("out/other").mkdir()
    with pytest.raises(InputError, match=r"out/other: exists, but .* holds no provenance"):
        main(["out/other"])


@pytest.mark.parametrize("source", [".", "data", "data/FashionMNIST/raw"])
def test_a_folder(pixels: dict[str, np.ndarray], tmp_path: Path, source: str) -> None:
    """From the compressed files alone; class ids are the labels."""
    for path in Path("data/FashionMNIST/raw").glob("*ubyte"):
        path.unlink()
    if source == ".":
        Path("usr/share/datasets").mkdir(parents=True)
        shutil.move("data/FashionMNIST/raw", "usr/share/datasets/fashion-mnist")
    main(["out", "--folder", "--source", source])
    train = ImageFolder(Path("out/train"))
    assert train.class_names == [f"{number}_{name}" for number, name in enumerate(CLASS_NAMES)]
    check(train, pixels["train"])
    check(ImageFolder(Path("out/heldout")), pixels["t10k"])
    main(["out", "--folder", "--source", source])
    with pytest.raises(InputError, match="out: exists with another provenance: form: found folder, expected shards"):
        main(["out", "--source", source])


def test_missing_and_wrong_files(pixels: dict[str, np.ndarray], tmp_path: Path) -> None:
    raw = Path("data/FashionMNIST/raw")
    with pytest.raises(InputError, match=r"found no train-images-idx3-ubyte or .*\.gz in absent, .*apt-get download"):
        main(["out", "--source", "absent"])
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\0" * 28)
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte: found content with sha256 .*MNIST's files"):
        main(["out"])
    (raw / "t10k-labels-idx1-ubyte").unlink()
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes((raw / "t10k-labels-idx1-ubyte.gz").read_bytes()[:20])
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\.gz: damaged"):
        main(["out"])
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match=r"raw: found no t10k-labels-idx1-ubyte or .*FashionMNIST\('data'"):
        main(["out"])
    assert not Path("out").exists()


@pytest.mark.slow
def test_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if shutil.which("apt-get") is None:
        pytest.skip("no apt-get")
    get = "apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb ."
    done = subprocess.run(["bash", "-c", get], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode != 0:
        pytest.skip(f"the package could not be downloaded: {done.stderr.splitlines()[-1]}")
    main(["shards", "--source", "."])
    for name, count in (("train", 60_000), ("heldout", 10_000)):
        shards = TarShards(f"shards/{name}-*.tar")
        assert np.bincount(shards.class_ids).tolist() == [count // 10] * 10
        assert shards[0][0].size == (32, 32)
