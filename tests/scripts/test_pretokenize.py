"""Pre-tokenization against encoding image by image, and its errors."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from data.codes.store_files import write_meta
from data.codes.token_store import TokenStore, open_tokens
from data.images.reading import open_images
from data.images.transforms import adm_center_crop
from modeling.loading import load_tokenizer
from scripts import make_shards, pretokenize
from tests.conftest import make_noise_images
from tests.processes import ROOT, run_script
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import weights_sha256

SCRIPT = "scripts/pretokenize.py"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_noise_images(tmp_path / "images", 3, 20, 24)


def arguments(tiny_arguments: list[str], images: Path, output: Path, *more: str) -> list[str]:
    return [
        *tiny_arguments,
        f"experiment.output_dir={output.parent / 'unused'}",
        f"dataset.params.train_shards_path_or_url={images}",
        f"dataset.params.pretokenization={output}",
        *more,
    ]


@pytest.mark.parametrize("batch_size", [1, 32])
def test_codes_are_those_of_the_crops_in_order(
    tiny_arguments: list[str], images: Path, tmp_path: Path, batch_size: int
) -> None:
    output = tmp_path / "codes.jsonl"
    config = load_config(arguments(tiny_arguments, images, output, f"training.per_gpu_batch_size={batch_size}"))
    pretokenize.main(config)
    store_file = tmp_path / "codes.tokens/tokens.npy"
    converted = store_file.stat().st_ino
    store = open_tokens(output, codebook_size=24, image_seq_len=16, num_classes=5)
    assert store_file.stat().st_ino == converted  # the store of the jsonl is up to date
    assert len(output.read_text().splitlines()) == len(store) == 60
    assert store.class_ids.tolist() == [0] * 30 + [1] * 30
    assert store.meta.class_names == ["cat", "dog"]
    assert store.meta.crops_per_image == 10
    tokenizer = load_tokenizer(config)
    expected = []
    for path in sorted(images.rglob("*.png")):
        for crop in F.ten_crop(adm_center_crop(Image.open(path), 17), 16):
            expected.append(tokenizer.encode(F.to_tensor(crop)[None])[0])
    np.testing.assert_array_equal(store.codes, torch.stack(expected))


def store_files(output: Path) -> dict[str, bytes]:
    """Everything but the time stamp of the jsonl."""
    files = {path.name: path.read_bytes() for path in output.with_suffix(".tokens").iterdir()}
    meta = json.loads(files.pop("meta.json"))
    meta["source"].pop("mtime_ns")
    return {**files, "meta": json.dumps(meta).encode(), "jsonl": output.read_bytes()}


@pytest.fixture
def many_images(images: Path) -> Path:
    """As `images`, but 600 of the first class: chunks of 258, 258 and 87, read 3 at a time."""
    for i in range(10, 607):
        shutil.copy(images / "cat/0.png", images / f"cat/{i}.png")
    return images


@pytest.mark.multiprocess
def test_any_number_of_processes_and_kills_give_the_same_bytes(
    tiny_arguments: list[str], many_images: Path, tmp_path: Path
) -> None:
    def arguments_of(name: str) -> list[str]:
        (tmp_path / name).mkdir()
        return arguments(tiny_arguments, many_images, tmp_path / name / "codes.jsonl", "training.per_gpu_batch_size=30")

    alone = arguments_of("alone")
    pretokenize.main(load_config(alone))
    expected = store_files(tmp_path / "alone/codes.jsonl")
    done = run_script([SCRIPT, *arguments_of("three")], tmp_path, processes=3)
    assert done.returncode == 0, done.stderr
    assert store_files(tmp_path / "three/codes.jsonl") == expected

    killed, folder = arguments_of("killed"), tmp_path / "killed"
    assert run_script([SCRIPT, *killed], tmp_path, processes=2, REAR_FAULT="chunk.rename.1").returncode == 1
    assert not (folder / "codes.jsonl").exists()
    first = folder / "codes.tokens.chunks/000000000000.npy"
    written = first.stat().st_mtime_ns if first.exists() else None
    for fault in ("chunk.begin.1", "join.begin", "join.end"):
        assert run_script([SCRIPT, *killed], tmp_path, REAR_FAULT=fault).returncode == -9
        assert not (folder / "codes.tokens").exists()
        assert written in (None, first.stat().st_mtime_ns)  # finished chunks are not made again
    pretokenize.main(load_config(killed))
    assert store_files(folder / "codes.jsonl") == expected
    assert sorted(path.name for path in folder.iterdir()) == ["codes.jsonl", "codes.tokens"]


def test_chunks_and_stores_of_another_provenance_are_refused(
    tiny_arguments: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = arguments(tiny_arguments, images, tmp_path / "codes.tokens")
    other = [*ours, "dataset.preprocessing.pretokenize_crops=center"]
    monkeypatch.setattr(pretokenize, "join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretokenize.main(load_config(ours))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"pretokenize_crops: found ten_crop, expected center"):
        pretokenize.main(load_config(other))
    (images / "dog/1.png").rename(images / "dog/x.png")
    with pytest.raises(InputError, match="source_sha256: found "):
        pretokenize.main(load_config(ours))
    (images / "dog/x.png").rename(images / "dog/1.png")
    pretokenize.main(load_config(ours))
    before = (tmp_path / "codes.tokens/tokens.npy").stat().st_ino
    pretokenize.main(load_config(ours))  # nothing left to do
    assert (tmp_path / "codes.tokens/tokens.npy").stat().st_ino == before
    with pytest.raises(InputError, match=r"codes\.tokens: .*pretokenize_crops: found ten_crop, expected center"):
        pretokenize.main(load_config(other))


def test_the_store_records_its_provenance(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    config = load_config(arguments(tiny_arguments, images, tmp_path / "codes.tokens"))
    pretokenize.main(config)
    meta = TokenStore(tmp_path / "codes.tokens").meta
    assert (meta.grid_size, meta.codebook_size, meta.crops_per_image, meta.num_classes) == (4, 24, 10, 2)
    assert meta.tokenizer_sha256 == weights_sha256(load_tokenizer(config))
    assert meta.source_sha256 == open_images(str(images)).fingerprint
    assert meta.settings["dataset.preprocessing.pretokenize_crops"] == "ten_crop"


def replace_image(path: Path) -> None:
    """Another image of the same name and class."""
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)


def test_images_replaced_under_their_names_are_another_source(
    tiny_arguments: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    finished = arguments(tiny_arguments, images, tmp_path / "finished.tokens")
    killed = arguments(tiny_arguments, images, tmp_path / "killed.tokens")
    pretokenize.main(load_config(finished))
    monkeypatch.setattr(pretokenize, "join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretokenize.main(load_config(killed))
    monkeypatch.undo()
    replace_image(images / "dog/1.png")
    for command, name in ((finished, r"finished\.tokens"), (killed, r"killed\.tokens\.chunks")):
        with pytest.raises(InputError, match=rf"{name}: exists with another provenance: source_files: found "):
            pretokenize.main(load_config(command))
    store = tmp_path / "finished.tokens"
    write_meta(store, replace(TokenStore(store).meta, source_files=None))  # of an earlier version
    pretokenize.main(load_config(finished))
    assert "records no sizes and times of its images" in capsys.readouterr().out


def test_shards_that_state_their_content_may_be_copied(
    tiny_arguments: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards.main([str(images), str(tmp_path / "shards")])
    shards = tmp_path / "shards/train-*.tar"
    finished = arguments(tiny_arguments, shards, tmp_path / "finished.tokens")
    killed = arguments(tiny_arguments, shards, tmp_path / "killed.tokens")
    pretokenize.main(load_config(finished))
    monkeypatch.setattr(pretokenize, "join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretokenize.main(load_config(killed))
    monkeypatch.undo()
    shard = tmp_path / "shards/train-000000.tar"
    os.utime(shard, (1, 1))
    pretokenize.main(load_config(finished))
    content = bytearray(shard.read_bytes())
    content[content.rindex(b"IDAT") + 9] ^= 1  # of the same size
    shard.write_bytes(content)
    for command in (finished, killed):
        with pytest.raises(InputError, match="source_files: found"):
            pretokenize.main(load_config(command))
    content[content.rindex(b"IDAT") + 9] ^= 1
    shard.write_bytes(content)
    pretokenize.main(load_config(killed))
    meta = [TokenStore(tmp_path / f"{name}.tokens").meta for name in ("finished", "killed")]
    assert meta[0].sha256 == meta[1].sha256


def test_only_a_store(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes.tokens"
    pretokenize.main(
        load_config(arguments(tiny_arguments, images, output, "dataset.preprocessing.pretokenize_crops=center_flip"))
    )
    assert len(open_tokens(output, 24, 16, 5)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.tokens", "images"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.params.train_shards_path_or_url=null", "train_shards_path_or_url: missing"),
        ("dataset.params.pretokenization=null", "pretokenization: missing"),
        ("dataset.params.pretokenization=codes.npz", "ends in .jsonl or .tokens"),
        ("model.vq_model.codebook_size=4294967297", "codebook_size=4294967297: expected at most 4294967296"),
        ("dataset.preprocessing.crop_size=8", "crop_size=8: expected model.vq_model.resolution=16"),
        ("model.generator.condition_num_classes=1", "dog/0.png: found class id 1, expected less than 1"),
    ],
)
def test_wrong_configs(tiny_arguments: list[str], images: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        pretokenize.main(load_config(arguments(tiny_arguments, images, tmp_path / "codes.tokens", override)))
    assert "\n" not in str(error.value)


def test_codes_that_are_there_are_not_replaced(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    output = tmp_path / "codes.jsonl"
    output.write_text("downloaded\n")
    with pytest.raises(InputError, match=r"codes\.jsonl: exists without the store"):
        pretokenize.main(load_config(arguments(tiny_arguments, images, output)))
    output.unlink()
    pretokenize.main(load_config(arguments(tiny_arguments, images, output)))
    written = output.read_bytes()
    pretokenize.main(load_config(arguments(tiny_arguments, images, output)))
    assert output.read_bytes() == written
    output.write_text("edited\n")
    with pytest.raises(InputError, match=r"codes\.jsonl: exists and is not .*codes\.tokens as jsonl"):
        pretokenize.main(load_config(arguments(tiny_arguments, images, output)))
    assert output.read_text() == "edited\n"


def test_bad_image_leaves_no_store(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    (images / "dog/1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"dog/1\.png"):
        pretokenize.main(load_config(arguments(tiny_arguments, images, tmp_path / "codes.jsonl")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.tokens.chunks", "images"]


def test_a_typo_ends_before_the_slow_imports(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/pretokenize.py", "dataset.params.pretokenisation=a.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "did you mean" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", ["no image", "strip"])
def test_skip_leaves_bad_images_out(
    tiny_arguments: list[str], images: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    whole, some = tmp_path / "whole.tokens", tmp_path / "some.tokens"
    skip = ["dataset.params.on_bad_sample=skip", "dataset.params.num_workers_per_gpu=1"]
    pretokenize.main(load_config(arguments(tiny_arguments, images, whole)))
    if kind == "strip":
        Image.new("1", (1, 250_000)).save(images / "cat/2.png")
    else:
        (images / "cat/2.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"1 of 6 images cannot be decoded.*max_bad_fraction=0\.001: .*cat/2\.png"):
        pretokenize.main(load_config(arguments(tiny_arguments, images, some, *skip)))
    pretokenize.main(load_config(arguments(tiny_arguments, images, some, *skip, "dataset.params.max_bad_fraction=0.2")))
    assert "some.tokens: 6 images, 1 left out, 50 samples" in capsys.readouterr().out
    store, rows = TokenStore(some), np.r_[0:20, 30:60]
    np.testing.assert_array_equal(store.codes, TokenStore(whole).codes[rows])
    assert store.class_ids.tolist() == [0] * 20 + [1] * 30
    assert store.meta.num_skipped == 1


def test_another_background_is_another_store(tiny_arguments: list[str], images: Path, tmp_path: Path) -> None:
    ours = arguments(tiny_arguments, images, tmp_path / "codes.tokens")
    pretokenize.main(load_config(ours))
    settings = TokenStore(tmp_path / "codes.tokens").meta.settings
    assert "dataset.preprocessing.background" not in settings  # as in older stores
    with pytest.raises(InputError, match=r"preprocessing\.background: found None, expected black"):
        pretokenize.main(load_config([*ours, "dataset.preprocessing.background=black"]))
