"""Reference files from folders, shards and npz files."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.images.transforms import adm_center_crop
from evaluation import make_reference
from evaluation.inputs import POOL_DIM, SPATIAL_DIM, open_input
from tests.evaluation.made_up import StubExtractor
from utils.errors import InputError

EDGE = 16
IMAGES = [
    np.random.default_rng(i).integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8) for i in range(6)
]  # of six sizes


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """The same images as a folder per class and as a shard."""
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for i, image in enumerate(IMAGES):
            path = tmp_path / f"folder/class{i // 3}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            for name, content in ((f"{i}.png", path.read_bytes()), (f"{i}.cls", str(i // 3).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return {"folder": str(tmp_path / "folder"), "shards": str(tmp_path / "images.tar")}


def make(monkeypatch: pytest.MonkeyPatch, source: str, output: Path, *options: str) -> None:
    monkeypatch.setattr(make_reference, "load_extractor", lambda *_: StubExtractor(POOL_DIM, SPATIAL_DIM))
    command = ["make_reference.py", source, str(output), f"--resolution={EDGE}", "--batch-size=4", *options]
    monkeypatch.setattr(sys, "argv", command)
    make_reference.main()


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_statistics_are_of_all_images_and_arr_0_of_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sources: dict[str, str], kind: str
) -> None:
    output = tmp_path / "reference.npz"
    make(monkeypatch, sources[kind], output, "--max-images=4")
    crops = np.stack([np.asarray(adm_center_crop(Image.fromarray(image), EDGE)) for image in IMAGES])
    opened = open_input(output, verify=True)
    np.testing.assert_array_equal(opened.images.read(0, 4), crops[[0, 1, 3, 4]])
    features = StubExtractor(POOL_DIM, SPATIAL_DIM)(torch.from_numpy(crops))
    for value, suffix in ((features.pool, ""), (features.spatial, "_s")):
        np.testing.assert_allclose(opened.statistics[f"mu{suffix}"], value.double().mean(0), atol=1e-6)
        np.testing.assert_allclose(opened.statistics[f"sigma{suffix}"], np.cov(value.double().T), atol=1e-6)


def test_npz_of_the_right_size_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, EDGE, EDGE, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    make(monkeypatch, str(tmp_path / "images.npz"), tmp_path / "reference.npz")
    np.testing.assert_array_equal(open_input(tmp_path / "reference.npz", verify=True).images.read(0, 5), images)


def test_faults_come_before_any_feature(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sources: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StubExtractor, "__call__", None)  # not callable
    with pytest.raises(InputError, match=r"none/x.npz: no folder"):
        make(monkeypatch, sources["folder"], tmp_path / "none/x.npz")
    with pytest.raises(InputError, match=r"missing.npz: no such file"):
        make(monkeypatch, str(tmp_path / "missing.npz"), tmp_path / "x.npz")
    for path in (tmp_path / "folder/class0").glob("*.png"):
        path.rename(tmp_path / path.name)
    (tmp_path / "folder/class0").rmdir()
    with pytest.raises(InputError, match=r"folder: found 3 images, expected at least 4"):
        make(monkeypatch, sources["folder"], tmp_path / "x.npz")
    with pytest.raises(SystemExit):
        make(monkeypatch, sources["folder"], tmp_path / "x.npz", "--max-images=3")
    assert "--max-images 3: expected at least 4" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_another_reference_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sources: dict[str, str]
) -> None:
    output = tmp_path / "reference.npz"
    for _ in range(2):
        make(monkeypatch, sources["folder"], output)
    before = output.read_bytes()
    for source, options, reason in (
        (sources["folder"], ["--max-images=4"], "max_images: found 10000, expected 4;"),
        (sources["shards"], [], "images: found"),
    ):
        with pytest.raises(InputError, match=f"reference.npz: .*{reason}"):
            make(monkeypatch, source, output, *options)
    output.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"reference.npz: .*reference.json holds no provenance"):
        make(monkeypatch, sources["folder"], output)
    assert output.read_bytes() == before
