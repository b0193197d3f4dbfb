"""Random folders: each file is an image of the source, skipped with a notice, or named in one line."""

import io
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.images.image_io import ImageDecoding
from data.images.reading import open_images
from utils.errors import InputError

FOLDERS, MAX_FILES = 400, 8
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
NAMES = (*(b"a", b"10", b"2", b"003", b"b c", b"\xff\xfe", "é".encode(), b"-x"), b"a\nb", b".h", b"%d", b"{0..3}", b"*")
EXTENSIONS = (b".png", b".JPG", b".jpeg", b".webp", b".txt", b"", b".tar", b".gif", b".tif", b".json", b".png.txt")


def encoded(rng: random.Random) -> bytes:
    """An image of some mode and format, perhaps damaged, or no image at all."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice([b"", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\0" * 100, b"BM", b"II*\0", b"<html>"])
    stream, shape = io.BytesIO(), (rng.randint(1, 9), rng.randint(1, 9))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    mode = rng.choice(MODES)
    try:
        image = image.convert("L").convert(mode) if mode in ("I", "F", "I;16", "LA", "PA") else image.convert(mode)
        image.save(stream, rng.choice(FORMATS))
    except (OSError, ValueError):  # a format that does not hold this mode
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    if kind < 0.3:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind < 0.4:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


def make_folder(rng: random.Random, root: bytes) -> int:
    """A folder with perhaps classes, nesting, links and files of all kinds; how many files in it are not hidden."""
    count = 0
    os.mkdir(root)
    for _ in range(rng.randint(0, MAX_FILES)):
        parts = [rng.choice(NAMES) for _ in range(rng.choice([0, 1, 1, 1, 2]))]
        path = os.path.join(root, *parts, b"file" + rng.choice(NAMES) + rng.choice(EXTENSIONS))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.lexists(path):
            continue
        if rng.random() < 0.05:
            os.symlink(b"nowhere", path)
        else:
            with open(path, "wb") as file:
                file.write(encoded(rng))
        count += not any(name.startswith(b".") for name in parts)
    if rng.random() < 0.7:  # else most folders have a class without images
        for name in [name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name))]:
            Image.new("RGB", (3, 2)).save(os.fsdecode(os.path.join(root, name, b"good.png")))
            count += not name.startswith(b".")
    if rng.random() < 0.1:
        os.makedirs(os.path.join(root, b"a"), exist_ok=True)
        os.symlink(b"..", os.path.join(root, b"a", b"round"))
    return count


def refusal_of(act: Callable[[], Any]) -> tuple[Any, str]:
    """What it gives, or the one line that it is refused with."""
    try:
        return act(), ""
    except InputError as error:
        return None, str(error)


def test_every_file_is_read_counted_or_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = random.Random(0)
    opened = read = refused = 0
    for number in range(FOLDERS):
        root = tmp_path / f"{number}."
        visible = make_folder(rng, os.fsencode(root))
        source, refusal = refusal_of(lambda: open_images(str(root), decoding=ImageDecoding("black", True)))  # noqa: B023
        notices = capsys.readouterr().err
        assert "\n" not in refusal
        assert all(line.startswith("notice: ") for line in notices.splitlines())
        if source is None:
            assert str(root) in refusal
            continue
        opened += 1
        skipped = [int(count) for count in re.findall(r": skipped (\d+) files ", notices)]
        assert len(source) + sum(skipped) == visible, notices
        for index in range(len(source)):
            sample, refusal = refusal_of(lambda: source[index])  # noqa: B023
            if sample is None:
                refused += 1
                assert refusal.startswith(source.location(index))
                assert "\n" not in refusal
            else:
                read += 1
                assert sample[0].mode == "RGB"
                assert 0 <= sample[1] < len(source.class_names)
    assert min(opened, refused) > FOLDERS / 10
    assert read > FOLDERS
