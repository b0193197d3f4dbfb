"""Mounts that cannot do everything, fail or are full; a run folder that is deleted. Everything is written, or one line
names the path."""

import errno
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import current_process
from pathlib import Path

import numpy as np
import pytest

from data.codes.conversion import store_to_jsonl
from data.codes.jsonl import Sizes, read_range
from data.codes.token_store import open_tokens
from data.loading import Batches
from scripts import convert_tokens, make_shards, sample_imagenet_rear, train_rear
from tests.conftest import make_noise_images
from tests.faults.runs import Run
from utils.config import load_config
from utils.errors import InputError, environment_error
from utils.files import lock
from utils.files.atomic import atomic_folder, write_text
from utils.files.hashing import range_sha256
from utils.files.lock import only_writer, still_held
from utils.files.npz import StoredImages
from utils.files.text import read_text
from utils.processes import in_processes

SIZES = Sizes(codebook_size=24, image_seq_len=16, num_classes=5)
UNREADABLE = Path("/proc/self/mem")  # reading its first page is an error EIO of the operating system


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Call `mount` with arguments and a folder of `tmp_path`, as root."""
    mounted: list[Path] = []

    def on(folder: Path, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, encoding="utf-8")
        if done.returncode:
            pytest.skip(f"mount: {done.stderr.strip()}")
        if folder not in mounted:
            mounted.append(folder)

    yield on
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def codes(tiny_config_file: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return Path(shutil.copy(tiny_config_file.parent / "codes.jsonl", tmp_path / "data"))


@pytest.fixture(params=[errno.EINVAL, errno.ENOTSUP])
def poor_mount(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CIFS or FUSE: chmod is not permitted, and fsync of a folder is not supported."""
    fsync = os.fsync

    def chmod(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(arguments[0]))

    def fsync_of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(request.param, os.strerror(request.param))
        fsync(descriptor)

    monkeypatch.setattr(os, "chmod", chmod)
    monkeypatch.setattr(os, "fsync", fsync_of_files)


def test_a_mount_without_permissions_and_flush_of_folders_gets_everything(
    tiny_arguments: list[str], codes: Path, tmp_path: Path, poor_mount: None
) -> None:
    run = tmp_path / "run"
    arguments = [*tiny_arguments, f"experiment.output_dir={run}", f"dataset.params.pretokenization={codes}"]
    config = load_config([*arguments, "training.max_train_steps=2", "experiment.save_every=1"])
    assert train_rear.main(config) == "completed"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert {"config.yaml", "model.safetensors"} < {path.name for path in run.iterdir()}
    images = make_noise_images(tmp_path / "images", 3, 8, 8)
    make_shards.main([str(images), str(tmp_path / "shards"), "--processes", "1"])
    assert (tmp_path / "shards/classes.json").is_file()
    samples = [f"experiment.generator_checkpoint={run}", "sampling.num_fid_samples=3"]
    sample_imagenet_rear.main(load_config([*arguments, *samples, f"experiment.output_dir={tmp_path / 'samples'}"]))
    assert len(np.load(tmp_path / "samples.npz")["arr_0"]) == 3
    store_to_jsonl(codes.with_suffix(".tokens"), tmp_path / "again.jsonl", processes=1)
    assert not [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.deleted")]


def test_other_errors_of_fsync_are_named_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error") as error:
        write_text(tmp_path / "a.txt", "text")
    assert str(tmp_path / "a.txt") in environment_error(error.value)
    assert list(tmp_path.iterdir()) == []


def test_read_only_data_with_a_store_train(
    mount: Callable[..., None], tiny_arguments: list[str], codes: Path, tmp_path: Path
) -> None:
    """The time of the jsonl is new, as after a copy, and cannot be noted."""
    open_tokens(codes, *SIZES)
    os.utime(codes, ns=(1, 1))
    mount(codes.parent, "--bind", str(codes.parent))
    mount(codes.parent, "-o", "remount,bind,ro")
    arguments = [*tiny_arguments, f"experiment.output_dir={tmp_path / 'run'}", "training.max_train_steps=1"]
    config = load_config([*arguments, f"dataset.params.pretokenization={codes}"])
    assert train_rear.main(config) == "completed"


@pytest.mark.parametrize("key", ["pretokenization", "eval_pretokenization"])
def test_read_only_data_without_a_store_names_the_conversion(
    mount: Callable[..., None], tiny_arguments: list[str], codes: Path, tmp_path: Path, key: str
) -> None:
    mount(codes.parent, "--bind", str(codes.parent))
    mount(codes.parent, "-o", "remount,bind,ro")
    arguments = [*tiny_arguments, f"experiment.output_dir={tmp_path / 'run'}", "experiment.eval_every=1"]
    with pytest.raises(InputError) as error:
        train_rear.main(load_config([*arguments, f"dataset.params.{key}={codes}"]))
    message = str(error.value)
    store = codes.with_suffix(".tokens")
    assert message.startswith(f"{codes}: cannot be converted to {store} (")
    assert "Read-only file system" in message
    assert f"dataset.params.{key}=" in message
    command = message.partition("convert_tokens.py ")[2].partition(",")[0].replace("FOLDER", str(tmp_path)).split()
    convert_tokens.main(command)
    assert len(open_tokens(tmp_path / store.name, *SIZES)) == 50


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_an_error_while_tokens_are_read_names_the_file(
    codes: Path, monkeypatch: pytest.MonkeyPatch, workers: int, number: int
) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    store = open_tokens(codes, *SIZES)
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(InputError) as error:
        next(Batches(store, [[0, 1]], workers))
    assert str(error.value) == f"{store.path / 'tokens.npy'}: {os.strerror(number)}"


READERS: dict[str, Callable[[Path], object]] = {
    "hash": lambda path: range_sha256(path, 0, 9),
    "lines": lambda path: read_range(path, 0, 9, SIZES),
    "text": read_text,
    "pixels": lambda path: StoredImages(path, 0, (1, 1, 1, 3)).read(0, 1),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_its_file(reader: str) -> None:
    with pytest.raises((OSError, InputError), match="Input/output error") as error:
        READERS[reader](UNREADABLE)
    assert environment_error(error.value).startswith(f"{UNREADABLE}: ")


def test_an_error_of_the_disk_in_a_forked_process_is_one_line() -> None:
    chunks = [range(1), range(1, 2)]
    with pytest.raises(InputError, match=f"^{UNREADABLE}: "):
        list(in_processes(lambda chunk: READERS["hash"](UNREADABLE), chunks, processes=2))


def test_a_temporary_folder_that_is_too_long_for_a_socket_is_one_line(
    codes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delitem(current_process()._config, "tempdir", raising=False)
    with pytest.raises(InputError, match=f"^TMPDIR={folder}: "):
        Batches(open_tokens(codes, *SIZES), [[0, 1]], num_workers=1)
    monkeypatch.delitem(current_process()._config, "tempdir", raising=False)


def test_a_lock_on_a_full_disk_names_its_path_and_leaves_no_folder(mount: Callable[..., None], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=16k", "tmpfs")
    with pytest.raises(OSError, match="No space left"):
        (disk / "full").write_bytes(bytes(2**20))
    for inside in (True, False):
        with pytest.raises(OSError, match="No space left") as error, only_writer(disk / "new/run", inside=inside):
            pass
        assert str(disk / "new/run") in environment_error(error.value)
        assert [path.name for path in disk.iterdir()] == ["full"]


def test_a_run_folder_that_is_deleted_is_saved_again_and_the_run_stops(run: Run, oracle: Run) -> None:
    run.start(TEST_SLOW="0.2")
    run.wait_for_step(5)
    shutil.rmtree(run.folder)
    assert run.wait() == [1]
    line = run.output().splitlines()[-1]
    assert line.startswith("error: ")
    assert f"{run.folder} was deleted or moved" in line
    status = run.status()
    assert (status.status, run.checkpoints()) == ("failed", [f"checkpoint-{status.step}"])
    assert 5 <= status.step < 12
    assert {"config.yaml", "environment.txt", "metrics.jsonl"} < {path.name for path in run.folder.iterdir()}
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".lock")]
    run.completed()
    assert run.ids() == oracle.ids()
    ours, theirs = run.tensors(), oracle.tensors()
    assert [key for key in theirs if not ours[key].equal(theirs[key])] == []


@pytest.mark.multiprocess
def test_all_ranks_stop_if_the_run_folder_is_deleted(pair: Run) -> None:
    pair.start(processes=2, TEST_SLOW="0.2")
    pair.wait_for_step(5)
    shutil.rmtree(pair.folder)
    assert pair.wait() == [1, 1]
    assert "was deleted or moved" in pair.status().reason
    pair.completed(processes=2)


def test_a_lock_that_is_another_process_ends_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with only_writer(tmp_path / "run", inside=True):
        assert still_held(tmp_path / "run")
        (tmp_path / "run" / lock.LOCK).unlink()
        assert not still_held(tmp_path / "run")
        record = "filelock/2\npid=1\nhost=node7\nmode=lease\ntoken=ab\nduration=30.0\nstart=5\n"
        (tmp_path / "run" / lock.LOCK).write_text(record)
        assert statuses == []
        still_held(tmp_path / "run")
    assert statuses == [1]


def test_a_folder_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "a", replace=True) as partial:
            (partial / "file").write_text(content)
            assert not (tmp_path / "a").exists() or (tmp_path / "a/file").read_text() == "old"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a", replace=True):
        raise RuntimeError
    assert (tmp_path / "a/file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
