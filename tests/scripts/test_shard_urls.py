"""Pre-tokenizing and training on shards at URLs equal those on local files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.codes.token_store import TokenStore
from scripts import make_shards, pretokenize, train_rear
from tests.conftest import make_noise_images
from tests.processes import run_script
from tests.shard_server import Fault, ShardServer, serve_shards
from utils.config import load_config
from utils.errors import InputError

SHARDS = "train-{000000..000004}.tar"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    """It serves five shards of 4, 4, 4, 4 and 2 images, with shards.json and classes.json."""
    images = make_noise_images(tmp_path / "images", 9, 20, 24)
    make_shards.main([str(images), str(tmp_path / "served"), "--samples-per-shard", "4", "--processes", "1"])
    with serve_shards(tmp_path / "served") as server:
        yield server


def pretokenizing(tiny_arguments: list[str], shards: str, output: Path) -> list[str]:
    return [
        *tiny_arguments,
        f"experiment.output_dir={output.parent / 'unused'}",
        f"dataset.params.train_shards_path_or_url={shards}",
        f"dataset.params.pretokenization={output}",
        "training.per_gpu_batch_size=30",  # batches of 3 images
    ]


def content(store: Path) -> dict[str, object]:
    """Everything but what a server or a file system says about the shards."""
    files: dict[str, object] = {path.name: path.read_bytes() for path in store.iterdir()}
    meta = json.loads((store / "meta.json").read_text())
    return {**files, "meta.json": {**meta, "source_files": None}}


def test_stores_from_files_and_from_urls_are_equal(
    tiny_arguments: list[str], server: ShardServer, tmp_path: Path
) -> None:
    pretokenize.main(load_config(pretokenizing(tiny_arguments, f"{server.folder}/{SHARDS}", tmp_path / "files.tokens")))
    expected = content(tmp_path / "files.tokens")
    assert TokenStore(tmp_path / "files.tokens").meta.shard_samples == [4, 4, 4, 4, 2]
    server.faults["train-000001.tar"] = [Fault(break_after=1000)]
    server.faults["train-000002.tar"] = [Fault(status=503, retry_after="0")]
    alone = pretokenizing(tiny_arguments, server.url(SHARDS), tmp_path / "urls.tokens")
    pretokenize.main(load_config(alone))
    assert content(tmp_path / "urls.tokens") == expected
    assert TokenStore(tmp_path / "urls.tokens").meta.class_names == ["cat", "dog"]
    asked = len(server.asked)
    pretokenize.main(load_config(alone))  # nothing left to do: the shards are not read again
    assert len(server.asked) == asked


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_run_continues_with_another_number_of_processes(
    tiny_arguments: list[str], server: ShardServer, tmp_path: Path
) -> None:
    pretokenize.main(load_config(pretokenizing(tiny_arguments, f"{server.folder}/{SHARDS}", tmp_path / "files.tokens")))
    expected = content(tmp_path / "files.tokens")
    killed = pretokenizing(tiny_arguments, server.url(SHARDS), tmp_path / "killed.jsonl")
    command = ["scripts/pretokenize.py", *killed]
    assert run_script(command, tmp_path, processes=2, REAR_FAULT="chunk.rename.2").returncode == 1
    finished = sorted(path.name for path in (tmp_path / "killed.tokens.chunks").glob("*.npy"))
    assert "000000000002.npy" not in finished
    server.asked.clear()
    done = run_script(command, tmp_path, processes=3)
    assert done.returncode == 0, done.stderr
    read = [name for name, start in server.asked if name.endswith(".tar") and start == 0]
    unfinished = [f"train-{i:06d}.tar" for i in range(5) if f"{i:012d}.npy" not in finished]
    assert sorted(read) == unfinished
    store = content(tmp_path / "killed.tokens")
    assert store["tokens.npy"] == expected["tokens.npy"]
    assert store["meta.json"] == {**expected["meta.json"], "source": store["meta.json"]["source"]}  # of the jsonl
    assert not (tmp_path / "killed.tokens.chunks").exists()


def test_shards_that_changed_are_another_source(
    tiny_arguments: list[str], server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = pretokenizing(tiny_arguments, server.url(SHARDS), tmp_path / "codes.tokens")
    pretokenize.main(load_config(command))
    shard = server.folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes())  # another ETag
    with pytest.raises(InputError, match=r"codes\.tokens: exists with another provenance: source_files: found "):
        pretokenize.main(load_config(command))


def test_unreadable_images_are_left_out_up_to_a_fraction_of_all(
    tiny_arguments: list[str], server: ShardServer, tmp_path: Path
) -> None:
    shard = server.folder / "train-000004.tar"  # of two images
    content = bytearray(shard.read_bytes())
    content[content.index(b"IHDR")] ^= 1
    shard.write_bytes(content)
    skip = ["dataset.params.on_bad_sample=skip", "dataset.params.max_bad_fraction=0.1"]
    command = pretokenizing(tiny_arguments, server.url(SHARDS), tmp_path / "codes.tokens")
    pretokenize.main(load_config([*command, *skip]))
    assert TokenStore(tmp_path / "codes.tokens").meta.num_skipped == 1
    other = pretokenizing(tiny_arguments, server.url(SHARDS), tmp_path / "other.tokens")
    with pytest.raises(InputError, match=r"1 of 18 images cannot be decoded.*: http://.*train-000004\.tar, sample"):
        pretokenize.main(load_config([*other, skip[0]]))


def test_a_key_in_two_shards_names_both(tiny_arguments: list[str], server: ShardServer, tmp_path: Path) -> None:
    for name in ("shards.json", "classes.json"):
        (server.folder / name).unlink()
    (server.folder / "train-000001.tar").write_bytes((server.folder / "train-000000.tar").read_bytes())
    command = pretokenizing(tiny_arguments, server.url(SHARDS), tmp_path / "codes.tokens")
    with pytest.raises(InputError, match=r"train-000001\.tar, sample .*: found 4 keys .* such as .*train-000000\.tar"):
        pretokenize.main(load_config(command))
    assert not (tmp_path / "codes.tokens").exists()


def training(tiny_arguments: list[str], shards: str, output: Path, *more: str) -> list[str]:
    return [
        *tiny_arguments,
        f"experiment.output_dir={output}",
        "dataset.params.pretokenization=null",
        f"dataset.params.train_shards_path_or_url={shards}",
        f"dataset.params.cache_dir={output.parent / 'cache'}",
        "training.per_gpu_batch_size=2",
        "training.max_train_steps=6",
        "experiment.save_every=2",
        *more,
    ]


def test_training_from_urls_is_training_from_files(
    tiny_arguments: list[str], server: ShardServer, tmp_path: Path
) -> None:
    train_rear.main(load_config(training(tiny_arguments, f"{server.folder}/{SHARDS}", tmp_path / "files")))
    command = training(tiny_arguments, server.url(SHARDS), tmp_path / "urls")
    train_rear.main(load_config([*command, "training.stop_steps=3"]))  # stopped on the way, and resumed
    train_rear.main(load_config(command))
    check_training(server, tmp_path)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_from_urls_as_from_files(
    tiny_arguments: list[str], server: ShardServer, tmp_path: Path
) -> None:
    command = ["scripts/train_rear.py", *training(tiny_arguments, server.url(SHARDS), tmp_path / "urls")]
    files = training(tiny_arguments, f"{server.folder}/{SHARDS}", tmp_path / "files")
    for arguments in (["scripts/train_rear.py", *files], [*command, "training.stop_steps=3"], command):
        done = run_script(arguments, tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
    check_training(server, tmp_path)


def check_training(server: ShardServer, folder: Path) -> None:
    """Runs `files` and `urls` have equal weights, and each shard was downloaded once."""
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("files", "urls")]
    assert weights[0] == weights[1]
    read = [name for name, start in server.asked if name.endswith(".tar") and start == 0]
    assert sorted(read) == [f"train-{i:06d}.tar" for i in range(5)]


def test_a_cache_that_is_too_small_ends_before_the_start(
    tiny_arguments: list[str], server: ShardServer, tmp_path: Path
) -> None:
    command = training(tiny_arguments, server.url(SHARDS), tmp_path / "run", "dataset.params.cache_size_gb=1e-6")
    with pytest.raises(InputError, match=r"5 shards of .* do not fit .*cache_size_gb=1e-06; give a larger cache"):
        train_rear.main(load_config(command))
    assert not server.asked
