"""Rows 20 to 23 of the fault matrix: training data that is bad, cut, changed or incomplete.

The readers' own tests (tests/data) cover every kind of damage; these run the trainer on some.
"""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.codes.jsonl import Sizes
from data.codes.token_store import TokenStore, open_tokens
from data.images.tar_shards import COUNTS_FILE, TarShards
from tests.faults.runs import Run
from utils.errors import InputError
from utils.run.metrics_file import read_metrics

SIZES = Sizes(codebook_size=24, image_seq_len=16, num_classes=5)
BAD = {
    "wrong length": (b'{"class_id": 1, "tokens": [1, 2]}\n', "Expected `array` of length 16"),
    "code out of range": (
        b'{"class_id": 1, "tokens": [%s24]}\n' % (b"0, " * 15),
        "Expected `int` <= 23 - at `$.tokens[15]`",
    ),
    "label out of range": (
        b'{"class_id": 5, "tokens": [%s1]}\n' % (b"0, " * 15),
        "Expected `int` <= 4 - at `$.class_id`",
    ),
    "missing key": (b'{"tokens": [%s1]}\n' % (b"0, " * 15), "Object missing required field `class_id`"),
    "empty line": (b"\n", "empty line"),
    "not UTF-8": (b'{"class_id": 1, "tokens": "\xff\xfe"}\n', "not UTF-8"),
}


@pytest.fixture
def lines(tiny_config_file: Path) -> list[bytes]:
    return (tiny_config_file.parent / "codes.jsonl").read_bytes().splitlines(keepends=True)


def run_on(run: Run, path: Path, *overrides: str) -> list[int]:
    return run(f"dataset.params.pretokenization={path}", "training.max_train_steps=2", *overrides)


@pytest.mark.parametrize("kind", BAD)
def test_row_20_a_bad_line_is_named_before_the_first_step(run: Run, tmp_path: Path, lines: list[bytes], kind) -> None:
    bad, reason = BAD[kind]
    path = tmp_path / "codes.jsonl"
    path.write_bytes(b"".join([*lines[:6], bad, *lines[6:]]))
    assert run_on(run, path) == [1]
    assert f"error: {path}: line 7: {reason}" in run.output()
    assert not run.folder.exists()
    assert not path.with_suffix(".tokens").exists()


def test_row_20_the_first_ten_are_named(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_bytes(b"".join([*lines[:3], *[b"\n"] * 30, *lines[3:]]))
    with pytest.raises(InputError) as error:
        open_tokens(path, *SIZES)
    assert [number for number in range(1, 60) if f"line {number}: empty line" in str(error.value)] == [*range(4, 14)]


def test_row_20_skip_drops_with_a_count_up_to_a_fraction(run: Run, tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_bytes(b"".join([*lines[:6], b"\n", *lines[6:], BAD["missing key"][0]]))
    skip = ["dataset.params.on_bad_sample=skip", "dataset.params.max_bad_fraction=0.04"]
    assert run_on(run, path, *skip) == [0]
    assert (
        f"{path}: left out 2 bad lines: line 7: empty line; line 52: Object missing required field `class_id`"
        in run.output()
    )
    store = TokenStore(path.with_suffix(".tokens"))
    assert (len(store), store.meta.num_skipped) == (50, 2)
    assert store.codes[6].tolist() == json.loads(lines[6])["tokens"]
    with pytest.raises(InputError, match=r"2 of 52 lines are bad, dataset\.params\.max_bad_fraction=0\.03"):
        open_tokens(path, *SIZES, max_bad_fraction=0.03)
    with pytest.raises(InputError, match="line 7: empty line; line 52"):  # the lenient conversion does not count
        open_tokens(path, *SIZES)
    assert len(open_tokens(path, *SIZES, max_bad_fraction=0.04)) == 50


@pytest.mark.parametrize("cut", [2, 20])
def test_row_21_a_cut_last_line_is_called_truncated(run: Run, tmp_path: Path, lines: list[bytes], cut: int) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_bytes(b"".join(lines)[:-cut])
    assert run_on(run, path) == [1]
    assert f"{path}: line 50: truncated, the file ends inside it" in run.output()


def test_row_22_a_changed_jsonl_is_converted_again_and_is_other_data(
    run: Run, tmp_path: Path, lines: list[bytes]
) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_bytes(b"".join(lines))
    assert run_on(run, path) == [0]
    before = TokenStore(path.with_suffix(".tokens")).fingerprint
    os.utime(path, ns=(1, 1))  # another modification time, as after a copy: the same data
    assert run_on(run, path) == [0]
    path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    assert run_on(run, path) == [1]
    store = TokenStore(path.with_suffix(".tokens"))
    assert store.codes[0].tolist() == json.loads(lines[1])["tokens"]
    message = f"trained on other data: found hash {store.fingerprint[:12]}..., expected {before[:12]}..."
    assert message in run.output()


def test_row_22_changed_codes_are_found_on_demand(run: Run, tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_bytes(b"".join(lines))
    store = open_tokens(path, *SIZES)
    store.verify()
    tokens = store.path / "tokens.npy"
    content = bytearray(tokens.read_bytes())
    content[-3] ^= 1
    tokens.write_bytes(content)
    assert run_on(run, path, "dataset.params.verify_hashes=true") == [1]
    assert f"{tokens}: found sha256" in run.output()
    tokens.unlink()
    shutil.rmtree(store.path)
    assert run_on(run, path, "dataset.params.verify_hashes=true") == [0]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of four images and their counts."""
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"a-{shard}.tar"), mtime=0) as writer:
            for i in range(4):
                image = np.full((16, 16, 3), 30 * i, dtype=np.uint8)
                writer.write({"__key__": f"{shard}-{i}", "png": png_of(image), "cls": str(i)})
    (tmp_path / COUNTS_FILE).write_text(json.dumps({"a-0.tar": 4, "a-1.tar": 4}))
    return tmp_path


def png_of(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def rewrite(path: Path, skip: str, replace: dict[str, bytes] | None = None) -> None:
    """A well-formed shard without the members whose name starts with `skip`, or with other contents."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with path.open("wb") as stream, webdataset.TarWriter(stream, mtime=0) as writer:
        for name, content in members:
            if not name.startswith(skip):
                key, extension = name.split(".")
                content = (replace or {}).get(name, content)
                writer.write({"__key__": key, extension: content})


SHARD_DAMAGE = {
    "missing": (lambda path: path.unlink(), "a-1.tar: no such shard, expected 4 samples as in"),
    "empty": (lambda path: path.write_bytes(b""), "a-1.tar: "),
    "cut in a member": (lambda path: path.write_bytes(path.read_bytes()[:2600]), "after 1 images"),
    "cut between members": (lambda path: path.write_bytes(path.read_bytes()[:4096]), "after 2 images"),
    "garbage tail": (lambda path: path.write_bytes(path.read_bytes()[:4096] + b"x" * 3000), "after 2 images"),
    "fewer samples": (lambda path: rewrite(path, "1-3"), "a-1.tar: found 3 samples, expected 4 as in"),
    "missing cls": (lambda path: rewrite(path, "1-2.cls"), "a-1.tar, sample '1-2': found no class id"),
    "undecodable": (lambda path: rewrite(path, "-", {"1-2.png": b"no image"}), "a-1.tar, sample '1-2': cannot decode"),
}


@pytest.mark.parametrize("kind", SHARD_DAMAGE)
def test_row_23_a_damaged_shard_is_named_with_counts(run: Run, shards: Path, kind: str) -> None:
    damage, message = SHARD_DAMAGE[kind]
    damage(shards / "a-1.tar")
    images = ["dataset.params.pretokenization=null", f"dataset.params.train_shards_path_or_url={shards}/a-*.tar"]
    assert run(*images, "training.max_train_steps=2") == [1]
    assert message in run.output()
    assert run.output().strip().splitlines()[-1].startswith("error: ")


def test_row_23_skip_leaves_out_undecodable_images_up_to_a_fraction(run: Run, shards: Path) -> None:
    rewrite(shards / "a-1.tar", "-", {"1-2.png": b"no image"})
    images = ["dataset.params.pretokenization=null", f"dataset.params.train_shards_path_or_url={shards}/a-*.tar"]
    skip = ["dataset.params.on_bad_sample=skip", "training.max_train_steps=2"]  # two passes over the 8 images
    assert run(*images, *skip, "dataset.params.max_bad_fraction=0.1") == [1]
    message = "1 of 8 images cannot be decoded, expected at most dataset.params.max_bad_fraction=0.1: "
    assert f"error: {message}{shards}/a-1.tar, sample '1-2'" in run.output()
    run.completed(*images, *skip, "dataset.params.max_bad_fraction=0.2", "dataset.params.num_workers_per_gpu=2")
    assert run.output().count("a-1.tar, sample '1-2': cannot be decoded") == 1
    assert [row["train/skipped_images"] for row in read_metrics(run.folder / "metrics.jsonl")] == [1, 2]
    assert sorted(run.ids()[1]) == [*range(8)]


def test_row_23_whole_shards_train_and_other_patterns_do_not_count(run: Run, shards: Path) -> None:
    images = ["dataset.params.pretokenization=null", f"dataset.params.train_shards_path_or_url={shards}/a-*.tar"]
    run.completed(*images, "training.max_train_steps=2")
    counts = {"a-0.tar": 4, "a-1.tar": 4, "heldout-0.tar": 9}
    (shards / COUNTS_FILE).write_text(json.dumps(counts))
    assert len(TarShards(f"{shards}/a-*.tar")) == 8
    assert len(TarShards(f"{shards}/a-0.tar")) == 4
    (shards / COUNTS_FILE).write_text('["a"]')
    with pytest.raises(InputError, match=r"shards.json: found .*, expected a JSON object of shard names and counts"):
        TarShards(f"{shards}/a-*.tar")
