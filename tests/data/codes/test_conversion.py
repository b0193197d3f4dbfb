"""Conversion in chunks: any cut, any number of processes and any kill give the same bytes."""

import json
import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from data.codes import conversion
from data.codes.conversion import is_conversion, jsonl_to_store, store_to_jsonl
from data.codes.jsonl import BadLines, Sizes, format_lines, formatted_size, read_range
from data.codes.token_store import TokenStore
from utils.errors import InputError, TrainingError
from utils.files.chunk_files import ChunkFiles
from utils.processes import in_processes

SIZES = Sizes(codebook_size=1024, image_seq_len=6, num_classes=1000)
LINES = 500
NO_LINE = b"{}\n"


@pytest.fixture
def jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """500 lines of about 50 bytes, read in 29 chunks, written in 8 chunks."""
    rng = np.random.default_rng(0)
    path = tmp_path / "codes.jsonl"
    path.write_bytes(format_lines(rng.integers(0, 1000, LINES), rng.integers(0, 1024, (LINES, 6))))
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(conversion, "CHUNK_ROWS", 64)
    return path


def convert(jsonl: Path, name: str, processes: int = 1, **options: object) -> BadLines:
    return jsonl_to_store(jsonl, jsonl.with_name(name), SIZES, processes, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("length", [1, 7, 49, 50, 51, 1000, 10**6])
def test_every_line_belongs_to_one_range(jsonl: Path, length: int) -> None:
    size = jsonl.stat().st_size
    ranges = [read_range(jsonl, i, min(i + length, size), SIZES) for i in range(0, size, length)]
    whole = read_range(jsonl, 0, size, SIZES)
    assert sum(lines.num_lines for lines in ranges) == whole.num_lines == LINES
    np.testing.assert_array_equal(np.concatenate([lines.codes for lines in ranges]), whole.codes)
    np.testing.assert_array_equal(np.concatenate([lines.class_ids for lines in ranges]), whole.class_ids)


@pytest.mark.multiprocess
def test_processes_and_ranges_change_nothing(jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert(jsonl, "one.tokens").num_lines == LINES
    expected = contents(jsonl.with_name("one.tokens"))
    for processes in (2, 3):
        convert(jsonl, f"{processes}.tokens", processes)
        assert contents(jsonl.with_name(f"{processes}.tokens")) == expected
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 777)
    convert(jsonl, "other.tokens")
    store = TokenStore(jsonl.with_name("one.tokens"))
    assert TokenStore(jsonl.with_name("other.tokens")).fingerprint == store.fingerprint
    for processes in (1, 3):
        back = jsonl.with_name(f"back{processes}.jsonl")
        store_to_jsonl(store.path, back, processes)
        assert back.read_bytes() == jsonl.read_bytes()
    assert not [*jsonl.parent.glob("*.lines"), *jsonl.parent.glob("*.rows"), *jsonl.parent.glob("*.tmp")]


def test_sizes_are_known_before_formatting() -> None:
    class_ids, codes = np.array([0, 9, 10, 123_456_789]), np.array([[0, 9], [10, 99], [100, 65535], [1000, 9999]])
    assert formatted_size(class_ids, codes.astype(np.uint16)) == len(format_lines(class_ids, codes))
    large = codes.astype(np.uint32)
    large[2:] += np.array([[65_436, 4_294_901_760], [998_999_000, 999_990_000]], dtype=np.uint32)
    lines = format_lines(class_ids, large)
    assert formatted_size(class_ids, large) == len(lines)
    assert [json.loads(line)["tokens"] for line in lines.splitlines()] == large.tolist()


def in_child(function: object, *arguments: object, fault: str = "", kill_after: float = 0.0) -> int:
    """Exit code of a forked process that does it; killed from outside after some seconds, or by `utils.faults`."""

    def child() -> None:
        os.environ["REAR_FAULT"] = fault
        function(*arguments)

    process = get_context("fork").Process(target=child)
    process.start()
    if kill_after:
        time.sleep(kill_after)
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


@pytest.mark.multiprocess
def test_killed_conversions_resume(jsonl: Path) -> None:
    convert(jsonl, "expected.tokens")
    target, folder = jsonl.with_name("codes.tokens"), jsonl.with_name("codes.tokens.lines")
    for fault in ("chunk.begin.0", "chunk.rename.3", "chunk.begin.9", "join.begin", "join.end"):
        before = {path.name: path.stat().st_ino for path in folder.glob("*.npz")}
        assert in_child(convert, jsonl, target.name, fault=fault) == -signal.SIGKILL
        assert not target.exists()
        after = {path.name: path.stat().st_ino for path in folder.glob("*.npz")}
        assert before.items() <= after.items()
    assert len(after) == 29
    convert(jsonl, target.name, processes=2)
    assert contents(target) == contents(jsonl.with_name("expected.tokens"))

    back = jsonl.with_name("back.jsonl")
    arguments = (target, back, 1)
    for fault in ("chunk.begin.0", "chunk.rename.2", "chunk.begin.5", "join.begin"):
        assert in_child(store_to_jsonl, *arguments, fault=fault) == -signal.SIGKILL
        assert not back.exists()
    assert in_child(store_to_jsonl, *arguments, fault="join.end") == -signal.SIGKILL
    for _ in range(2):
        assert store_to_jsonl(*arguments) == 500
    assert back.read_bytes() == jsonl.read_bytes()
    assert not back.with_name("back.jsonl.rows").exists()
    back.write_bytes(b"?" * back.stat().st_size)
    with pytest.raises(InputError, match=r"back\.jsonl: exists and is not .*codes\.tokens as jsonl"):
        store_to_jsonl(*arguments)


@pytest.mark.multiprocess
def test_workers_do_not_outlive_a_killed_conversion(tmp_path: Path) -> None:
    chunk_files = ChunkFiles(tmp_path / "chunks", num_items=100, chunk_size=1, suffix=".txt")
    chunk_files.open({})

    def work(chunk: range) -> None:
        time.sleep(0.05)
        chunk_files.path(chunk).touch()

    assert in_child(lambda: list(in_processes(work, chunk_files.chunks, 3)), kill_after=0.4) == -signal.SIGKILL
    time.sleep(0.3)
    left = len(chunk_files.missing())
    time.sleep(0.3)
    assert len(chunk_files.missing()) == left > 0


@pytest.mark.multiprocess
def test_a_worker_that_fails_or_dies_ends_the_work() -> None:
    def fail(chunk: range) -> None:
        if chunk.start == 3:
            raise InputError("three")
        time.sleep(0.01)

    def die(chunk: range) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    chunks = [range(i, i + 1) for i in range(1000)]
    with pytest.raises(InputError, match="three"):
        list(in_processes(fail, chunks, 2))
    with pytest.raises(TrainingError, match="a worker process ended with exit code -9"):
        list(in_processes(die, chunks, 2))


def test_a_changed_file_is_converted_from_the_start(jsonl: Path) -> None:
    assert in_child(convert, jsonl, "codes.tokens", fault="join.begin") == -signal.SIGKILL
    lines = jsonl.read_bytes().splitlines(keepends=True)
    jsonl.write_bytes(b"".join(reversed(lines)))
    convert(jsonl, "codes.tokens")
    expected = read_range(jsonl, 0, jsonl.stat().st_size, SIZES).codes
    np.testing.assert_array_equal(TokenStore(jsonl.with_name("codes.tokens")).codes, expected)


@pytest.mark.parametrize("processes", [1, 3])
def test_bad_lines_have_their_number_in_the_file(jsonl: Path, processes: int) -> None:
    lines = jsonl.read_bytes().splitlines(keepends=True)
    bad = [20, 21, 300, 499]
    for number in bad:
        lines[number - 1] = NO_LINE
    jsonl.write_bytes(b"".join(lines))
    reasons = [f"line {number}: Object missing required field `class_id`" for number in bad]
    with pytest.raises(InputError) as error:
        convert(jsonl, "codes.tokens", processes)
    assert str(error.value) == f"{jsonl}: {'; '.join(reasons)}"
    assert [path.name for path in jsonl.parent.iterdir()] == ["codes.jsonl"]
    skipped = convert(jsonl, "codes.tokens", processes, max_bad_fraction=0.01)
    assert (skipped.count, skipped.reasons) == (4, reasons)
    assert len(TokenStore(jsonl.with_name("codes.tokens"))) == LINES - 4


def test_ten_bad_lines_end_a_long_file_early(jsonl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(conversion, "read_range", lambda *a: (read.append(a), read_range(*a))[1])
    jsonl.write_bytes(NO_LINE * 12 + jsonl.read_bytes())
    with pytest.raises(InputError, match=r"line 1: .*line 10: Object missing required field `class_id`$"):
        convert(jsonl, "codes.tokens")
    assert len(read) == 1


def test_crops_names_and_links(jsonl: Path) -> None:
    with pytest.raises(InputError, match="found 500 lines, expected a multiple of 3"):
        convert(jsonl, "codes.tokens", crops_per_image=3)
    names = [f"class {i}" for i in range(1000)]
    convert(jsonl, "codes.tokens", crops_per_image=10, class_names=names)
    store = TokenStore(jsonl.with_name("codes.tokens"))
    assert (store.meta.crops_per_image, store.meta.class_names, store.meta.grid_size) == (10, names, None)
    assert is_conversion(store.path, jsonl, SIZES, 0.0)
    store_to_jsonl(store.path, jsonl.with_name("elsewhere.jsonl"), processes=1)
    assert is_conversion(store.path, jsonl, SIZES, 0.0)
