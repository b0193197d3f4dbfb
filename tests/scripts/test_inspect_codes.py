"""Decoding rows to a grid and counting codes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.codes.code_statistics import CodeStatistics
from data.codes.token_writer import StoreMeta, new_token_store
from modeling.loading import load_tokenizer
from scripts import inspect_codes
from tests.script_config import script_config
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import weights_sha256
from utils.images import CAPTION_HEIGHT, GRID_GAP, make_captioned_grid


@pytest.fixture
def arguments(tiny_arguments: list[str], tmp_path: Path) -> list[str]:
    """30 samples of the classes a, b and c; sample i has the codes i and, once in four, 0."""
    codes = np.repeat(np.arange(30) % 20, 16).reshape(30, 16)
    codes[:, ::4] = 0
    sha256 = weights_sha256(load_tokenizer(load_config([*tiny_arguments, "experiment.output_dir=x"])))
    meta = StoreMeta(16, 24, crops_per_image=2, class_names=[*"abc"], tokenizer_sha256=sha256)
    with new_token_store(tmp_path / "codes.tokens", meta) as writer:
        writer.append(codes, np.array([0] * 5 + [1] * 25))
    return [
        *tiny_arguments,
        f"experiment.output_dir={tmp_path / 'out'}",
        f"dataset.params.pretokenization={tmp_path / 'codes.tokens'}",
    ]


def test_grid_and_statistics(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    inspect_codes.main(script_config(inspect_codes, [*arguments, "inspection.rows=[0,29,29]"]))
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "out/statistics.json").read_text())
    assert all(f"{name}: {value}" in out for name, value in figures.items())
    assert (figures["samples"], figures["images"], figures["codebook used"]) == (30, 15, "83.33%")
    assert figures["most frequent codes"].startswith("0 (30.00%), 1 (5.00%)")
    assert figures["classes"] == "3, 2 of them with samples"
    assert figures["samples of the rarest class"] == "0 (c)"
    assert figures["samples of the commonest class"] == "25 (b)"
    grid = np.asarray(Image.open(tmp_path / "out/codes.png"))
    assert grid.shape == (16 + CAPTION_HEIGHT, 8 * (16 + GRID_GAP) - GRID_GAP, 3)
    np.testing.assert_array_equal(grid[:, 18:34], grid[:, 36:52])
    assert (tmp_path / "out/statistics.png").stat().st_size > 1000


def test_random_rows(arguments: list[str], tmp_path: Path) -> None:
    config = script_config(inspect_codes, [*arguments, "inspection.num_images=100"])
    inspect_codes.main(config)
    assert Image.open(tmp_path / "out/codes.png").height == 4 * (16 + CAPTION_HEIGHT + GRID_GAP) - GRID_GAP


def test_entropy() -> None:
    statistics = CodeStatistics(np.array([2, 2, 0, 2, 2]), np.array([4]))
    assert (statistics.entropy, statistics.usage) == (2.0, 0.8)
    assert CodeStatistics(np.array([5, 0]), np.array([1])).entropy == 0.0


def test_captions_are_below_their_images() -> None:
    images = np.zeros((3, 20, 40, 3), np.uint8)
    grid = np.asarray(make_captioned_grid(images, ["x", "", "a long name that does not fit"], columns=3))
    captions = grid[20:] < 128
    assert captions[:, :40].any()
    assert not captions[:, 40:82].any()
    assert captions[:, 84:].any()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inspection.rows=[0,30]", "inspection.rows: found 30, expected 0 to 29"),
        ("dataset.params.pretokenization=null", "pretokenization: missing"),
    ],
)
def test_errors(arguments: list[str], override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inspect_codes.main(script_config(inspect_codes, [*arguments, override]))


def test_codes_of_another_tokenizer(arguments: list[str], tmp_path: Path) -> None:
    meta = tmp_path / "codes.tokens/meta.json"
    record = json.loads(meta.read_text())
    meta.write_text(json.dumps({**record, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(InputError, match=r"codes\.tokens: made by a tokenizer of sha256 0000.*tokenizer_checkpoint"):
        inspect_codes.main(script_config(inspect_codes, arguments))
    meta.write_text(json.dumps({**record, "tokenizer_sha256": None}))
    inspect_codes.main(script_config(inspect_codes, arguments))
