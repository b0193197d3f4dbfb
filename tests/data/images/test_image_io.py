"""From file to RGB: depth, transparency, orientation; ordinary images as Pillow converts them."""

import io

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from data.images.image_io import MAX_ASPECT_RATIO, ImageDecoding
from utils.errors import InputError

RAMP = np.linspace(0, 65535, 256 * 16).reshape(16, 256)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(encoded_image: bytes, **rule: object) -> np.ndarray:
    image = ImageDecoding(**rule).decode(encoded_image)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "PNG"), ("RGB", "JPEG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("RGB", "BMP")],
)
def test_ordinary_images_are_as_pillow_converts_them(noise: Image.Image, mode: str, kind: str) -> None:
    content = encoded(noise.convert(mode), kind)
    found = pixels(content, background="black", exif_orientation=True)
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_deep_grey_is_scaled(kind: str) -> None:
    deep = RAMP.astype(np.uint16)
    header = f"P5 {deep.shape[1]} {deep.shape[0]} 65535\n".encode()  # by hand: not every Pillow writes it
    image = header + deep.astype(">u2").tobytes() if kind == "PPM" else encoded(Image.fromarray(deep), kind)
    found = pixels(image)
    assert 126 < found.mean() < 129
    assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_range_that_is_not_known_is_refused(dtype: type) -> None:
    with pytest.raises(ValueError, match=r"32-bit grey of mode ., expected 8 or 16 bits"):
        ImageDecoding().decode(encoded(Image.fromarray(RAMP.astype(dtype)), "TIFF"))


def half_transparent() -> Image.Image:
    """Red; the left half is transparent."""
    rgba = np.full((4, 8, 4), (200, 10, 20, 255), dtype=np.uint8)
    rgba[:, :4, 3] = 0
    return Image.fromarray(rgba)


@pytest.mark.parametrize(("background", "value"), [("white", 255), ("grey", 128), ("black", 0)])
def test_transparency_shows_the_background(background: str, value: int) -> None:
    with_palette = Image.fromarray(np.repeat([[0, 1]], 4, axis=1).repeat(4, axis=0).astype(np.uint8), "P")
    with_palette.putpalette([9, 9, 9, 200, 10, 20])
    deep = Image.fromarray(np.where(np.arange(8) < 4, 777, 51456).astype(np.uint16)[None].repeat(4, axis=0))
    files = {
        "rgba": (encoded(half_transparent()), (200, 10, 20)),
        "webp": (encoded(half_transparent(), "WEBP", lossless=True), (200, 10, 20)),
        "palette": (encoded(with_palette, transparency=0), (200, 10, 20)),
        "grey with alpha": (encoded(half_transparent().convert("LA")), (68, 68, 68)),
        "16-bit grey": (encoded(deep, transparency=777), (201, 201, 201)),
    }
    for name, (content, colour) in files.items():
        found = pixels(content, background=background)
        assert (found[:, :4] == value).all(), name
        assert (found[:, 4:] == colour).all(), name


def test_an_opaque_alpha_channel_changes_nothing(noise: Image.Image) -> None:
    found = pixels(encoded(noise.convert("RGBA")))
    np.testing.assert_array_equal(found, np.asarray(noise))


def test_orientation(noise: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(noise, "PNG", exif=exif)
    found = pixels(content)
    np.testing.assert_array_equal(found, np.asarray(noise))
    found = pixels(content, exif_orientation=True)
    np.testing.assert_array_equal(found, np.rot90(np.asarray(noise), -1))


def test_a_damaged_exif_entry_does_no_harm(noise: Image.Image) -> None:
    content = encoded(noise, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(content, exif_orientation=True), np.asarray(Image.open(io.BytesIO(content))))


def test_the_first_of_several_frames(noise: Image.Image) -> None:
    content = encoded(noise, "TIFF", save_all=True, append_images=[Image.new("RGB", noise.size)])
    found = pixels(content)
    np.testing.assert_array_equal(found, np.asarray(noise))


@pytest.mark.parametrize("size", [(1, 250_000), (49_000_000, 1), (2, 2 * MAX_ASPECT_RATIO + 1)])
def test_a_strip_is_refused_before_it_is_decoded(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Enlarged to the shorter edge of a crop, it would cost gigabytes."""
    content = encoded(Image.new("1", size))
    monkeypatch.setattr(PngImageFile, "load", None)
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]} pixels, expected at most {MAX_ASPECT_RATIO} times"):
        ImageDecoding().decode(content)


def test_the_longest_image_that_is_read() -> None:
    assert pixels(encoded(Image.new("L", (MAX_ASPECT_RATIO, 1)))).shape == (1, MAX_ASPECT_RATIO, 3)


def test_formats_whose_readers_start_programs_are_not_read(noise: Image.Image) -> None:
    with pytest.raises(UnidentifiedImageError):
        ImageDecoding().decode(encoded(noise, "EPS"))
