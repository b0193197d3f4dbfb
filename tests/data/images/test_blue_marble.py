"""The embedded data set: no held-out pixel in training, every class in both splits, the same bytes each time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.images.blue_marble import REGIONS, TILE, build_shards, read_picture
from data.images.image_source import ImageSource
from data.images.reading import open_images

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blue_marble") / "tiles"
    build_shards(path)
    return path


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[str, ImageSource]:
    return {split: open_images(str(folder / f"{split}-*.tar")) for split in ("train", "heldout")}


def corners(source: ImageSource) -> np.ndarray:
    """(n, 2) pixel positions of the tiles' top left corners, from their keys."""
    keys = [re.fullmatch(r"\w+-x(\d+)-y(\d+)", source.key(i)) for i in range(len(source))]
    return np.array([[int(key[1]), int(key[2])] for key in keys])


def test_no_heldout_tile_touches_a_training_tile(splits: dict[str, ImageSource]) -> None:
    train, heldout = splits["train"], splits["heldout"]
    distance = np.abs(corners(heldout)[:, None] - corners(train)[None]).max(axis=-1)  # (heldout, train)
    assert distance.min() >= TILE
    same_region = heldout.class_ids[:, None] == train.class_ids[None]
    assert distance[same_region].min() == 2 * TILE  # a strip of one tile between them


def test_every_class_is_in_both_splits(splits: dict[str, ImageSource]) -> None:
    counts = {split: np.bincount(source.class_ids, minlength=len(REGIONS)) for split, source in splits.items()}
    assert counts["train"].min() >= 100
    assert counts["heldout"].min() >= 25
    assert counts["heldout"].sum() >= 600
    assert 0.15 < counts["heldout"].sum() / (counts["heldout"].sum() + counts["train"].sum()) < 0.25


def test_tiles_are_cut_from_the_picture_at_their_keys(splits: dict[str, ImageSource]) -> None:
    picture = np.asarray(read_picture())
    for source in splits.values():
        assert source.class_names == list(REGIONS)
        assert len({source.key(i) for i in range(len(source))}) == len(source)
        for index in range(0, len(source), 100):
            image, class_id = source[index]
            x, y = corners(source)[index]
            np.testing.assert_array_equal(np.asarray(image), picture[y : y + TILE, x : x + TILE])
            assert source.key(index).startswith(source.class_names[class_id])


def test_land_tiles_show_land(splits: dict[str, ImageSource]) -> None:
    for index in range(0, len(splits["train"]), 7):
        image, class_id = splits["train"][index]
        pixels = np.asarray(image).astype(int)
        assert pixels.std(axis=(0, 1)).mean() >= 2
        if class_id != list(REGIONS).index("ocean"):
            assert (pixels[..., 2] > pixels[..., :2].max(axis=-1) + 8).mean() <= 0.67


def test_the_same_bytes_again(folder: Path, tmp_path: Path) -> None:
    build_shards(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    shards = ["heldout-000000.tar", *(f"train-{i:06d}.tar" for i in range(3))]
    indices = [name.replace(".tar", ".index.npz") for name in shards]
    assert names == sorted(["classes.json", "shards.json", *shards, *indices])
    assert sorted(json.loads((folder / "shards.json").read_text())) == shards
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_script_leaves_a_complete_folder_alone(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    command = [sys.executable, "scripts/build_blue_marble.py", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == len(REGIONS) + 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
