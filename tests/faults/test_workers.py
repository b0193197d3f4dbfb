"""Errors inside data workers, small shared memory and waiting for data: every script ends by itself, with one line."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data.codes.token_store import TokenStore, open_tokens
from tests.conftest import make_noise_images
from tests.faults.runs import Run
from tests.processes import ROOT, run_script
from utils.run.status import EXIT_PREEMPTED

TIMEOUT_S = 300  # no test relies on it


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_noise_images(tmp_path / "images", 8, 16, 16)


def on_images(images: Path, workers: int) -> list[str]:
    return [
        "dataset.params.pretokenization=null",
        *(f"dataset.params.{split}_shards_path_or_url={images}" for split in ("train", "eval")),
        f"dataset.params.num_workers_per_gpu={workers}",
    ]


@pytest.mark.parametrize("workers", [1, 12])
def test_a_broken_image_ends_training(run: Run, images: Path, workers: int) -> None:
    (images / "dog/5.png").write_bytes(b"broken")
    assert run(*on_images(images, workers)) == [1]
    message = f"{images}/dog/5.png: cannot decode the image of 6 bytes: no known format"
    assert run.output().splitlines()[-1] == f"error: {message}"
    assert "Traceback" not in run.output()
    assert (run.status().status, run.status().reason) == ("failed", f"rank 0: {message}")


@pytest.mark.multiprocess
def test_a_broken_image_ends_all_ranks(pair: Run, images: Path) -> None:
    (images / "dog/5.png").write_bytes(b"broken")
    assert pair(*on_images(images, 12), processes=2) == [1, 1]
    assert "dog/5.png: cannot decode" in pair.status().reason


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_truncated_store_ends_training(run: Run, tiny_config_file: Path, tmp_path: Path, ranks: int) -> None:
    shutil.copy(tiny_config_file.parent / "codes.jsonl", tmp_path)
    open_tokens(tmp_path / "codes.jsonl", 24, 16, 5)
    assert len(TokenStore(tmp_path / "codes.tokens")) == 50
    store = f"dataset.params.pretokenization={tmp_path}/codes.tokens"
    endless = ("dataset.params.num_workers_per_gpu=1", "training.max_train_steps=100000")
    run.start(store, *endless, processes=ranks, TEST_SLOW="0.1")
    run.wait_for_step(2)
    os.truncate(tmp_path / "codes.tokens/tokens.npy", 200)
    assert run.wait() == [1] * ranks
    assert "tokens.npy: ends before sample" in run.output()
    assert run.status().status == "failed"


def test_a_stop_signal_acts_while_waiting_for_data(run: Run, images: Path) -> None:
    (images / "dog/5.png").unlink()
    os.mkfifo(images / "dog/5.png")  # opening it blocks forever, like a file on a dead server
    run.start(*on_images(images, 1), "training.per_gpu_batch_size=1", "training.max_train_steps=1000")
    run.wait_for_step(1)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    assert run.wait() == [EXIT_PREEMPTED]
    status = run.status()
    assert (status.status, status.reason) == ("preempted", "SIGTERM")
    assert (run.folder / f"checkpoint-{status.step}/manifest.json").is_file()


def start(
    script: str, images: Path, tiny_arguments: list[str], workers: int, *before: str, ranks: int = 1
) -> tuple[int, str]:
    """Exit status and stderr of a script on these images."""
    out = images.parent / "out"
    arguments = [*tiny_arguments, *on_images(images, workers), f"experiment.output_dir={out}"]
    arguments += ["training.max_train_steps=4", f"dataset.params.pretokenization={images.parent / 'c.tokens'}"]
    arguments = [a for a in arguments if not (script == "train_tokenizer" and "pretokenization=/" in a)]
    if not before:
        done = run_script([f"scripts/{script}.py", *arguments], images.parent, processes=ranks)
        return done.returncode, done.stderr
    command = [*before, sys.executable, str(ROOT / f"scripts/{script}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    return result.returncode, result.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("script", "ranks"),
    [("reconstruct", 1), *((name, n) for name in ("pretokenize", "train_tokenizer") for n in (1, 2))],
)
def test_a_broken_image_ends_every_script(script: str, ranks: int, images: Path, tiny_arguments: list[str]) -> None:
    (images / "dog/5.png").unlink()
    (images / "dog/5.png").symlink_to("nowhere.png")
    status, output = start(script, images, tiny_arguments, 12, ranks=ranks)
    assert status == 1
    assert f"error: {images}/dog/5.png: cannot be read: No such file or directory" in output.splitlines()
    assert "Traceback" not in output


SMALL = 'mount -t tmpfs -o size=200k tmpfs /dev/shm && exec "$@"'
MAY_MOUNT = subprocess.run(["unshare", "-rm", "sh", "-c", SMALL, "-", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not MAY_MOUNT, reason="may not mount a small /dev/shm")
def test_small_shared_memory_is_named(tmp_path: Path, tiny_arguments: list[str]) -> None:
    images = make_noise_images(tmp_path / "many", 150, 16, 16)
    large = [*tiny_arguments, "training.per_gpu_batch_size=3000"]  # 300 images of 17 x 17 x 3 bytes
    status, output = start("pretokenize", images, large, 4, "unshare", "-rm", "sh", "-c", SMALL, "-")
    assert status == 1
    assert output.splitlines()[-1].startswith("error: shared memory (/dev/shm) is full")


def test_few_open_files_are_named(images: Path, tiny_arguments: list[str]) -> None:
    status, output = start("pretokenize", images, tiny_arguments, 12, "sh", "-c", 'ulimit -n 32; exec "$@"', "-")
    assert status == 1
    assert output.splitlines()[-1].startswith("error: too many open files: raise the limit (ulimit -n 65536)")
