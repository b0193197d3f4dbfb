"""Token store and jsonl: what comes back is what was written, and what is wrong is named."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.batch_sampler import Draw, GlobalBatchSampler
from data.codes.conversion import store_to_jsonl
from data.codes.jsonl import LINES_PER_BATCH, Sizes, format_lines, parse_line, parse_published_lines
from data.codes.store_files import StoreMeta
from data.codes.token_store import TokenStore, open_tokens
from data.codes.token_writer import TokenStoreWriter
from utils.errors import InputError

SIZES = Sizes(codebook_size=1024, image_seq_len=6, num_classes=10)


def random_samples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1024, (count, 6)), rng.integers(0, 10, count)


def write_lines(path: Path, codes: np.ndarray, class_ids: np.ndarray) -> list[bytes]:
    path.write_bytes(format_lines(class_ids, codes))
    return path.read_bytes().splitlines(keepends=True)


def write_store(path: Path, codes: np.ndarray, class_ids: np.ndarray) -> TokenStore:
    with TokenStoreWriter(path, StoreMeta(image_seq_len=6, codebook_size=1024)) as writer:
        for start in range(0, len(codes), 7):
            writer.append(codes[start : start + 7], class_ids[start : start + 7])
    return TokenStore(path)


def test_jsonl_is_converted_once_and_comes_back_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    codes, class_ids = random_samples(LINES_PER_BATCH + 5)
    write_lines(path, codes, class_ids)
    published = b'{"class_id": %d, "tokens": [%s]}' % (class_ids[0], b", ".join(b"%d" % code for code in codes[0]))
    assert path.read_bytes().splitlines()[0] == published
    store = open_tokens(path, *SIZES)
    np.testing.assert_array_equal(store.codes, codes)
    np.testing.assert_array_equal(store.class_ids, class_ids)
    assert (store.codes.dtype, store.class_ids.dtype) == (np.uint16, np.int32)
    assert (store.meta.num_samples, store.meta.num_classes, store.meta.codebook_size) == (len(codes), 10, 1024)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["codes.jsonl", "codes.tokens"]

    converted = (tmp_path / "codes.tokens/tokens.npy").stat().st_ino
    open_tokens(path, *SIZES)
    assert (tmp_path / "codes.tokens/tokens.npy").stat().st_ino == converted
    store_to_jsonl(store.path, tmp_path / "again.jsonl", processes=1)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_changed_jsonl_is_converted_again(tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    write_lines(path, *random_samples(20))
    open_tokens(path, *SIZES)
    write_lines(path, *random_samples(20, seed=1))
    np.testing.assert_array_equal(open_tokens(path, *SIZES).codes, random_samples(20, seed=1)[0])


def test_exported_jsonl_needs_no_conversion(tmp_path: Path) -> None:
    store = write_store(tmp_path / "codes.tokens", *random_samples(20))
    store_to_jsonl(store.path, tmp_path / "codes.jsonl", processes=1)
    before = (tmp_path / "codes.tokens/tokens.npy").stat().st_ino
    assert len(open_tokens(tmp_path / "codes.jsonl", *SIZES)) == 20
    assert (tmp_path / "codes.tokens/tokens.npy").stat().st_ino == before


def test_batches(tmp_path: Path) -> None:
    codes, class_ids = random_samples(40)
    store = pickle.loads(pickle.dumps(write_store(tmp_path / "a.tokens", codes, class_ids)))
    assert isinstance(store.codes, np.memmap)
    batch = store.__getitems__([Draw(5, 3), 0, 39])
    assert all(value.dtype == torch.int64 for value in batch.values())
    np.testing.assert_array_equal(batch["codes"], codes[[5, 0, 39]])
    np.testing.assert_array_equal(batch["class_labels"], class_ids[[5, 0, 39]])
    assert batch["index"].tolist() == [5, 0, 39]
    assert store[5]["codes"].tolist() == codes[5].tolist()
    with pytest.raises(IndexError):
        store[40]
    sampler = GlobalBatchSampler(40, 8, 1, 0, 1, seed=0, first_step=0, last_step=7)
    for workers in (0, 2):
        loader = DataLoader(store, batch_sampler=sampler, num_workers=workers, collate_fn=store.collate)
        for batch, draws in zip(loader, sampler, strict=True):
            assert batch["index"].tolist() == [draw.index for draw in draws]
            np.testing.assert_array_equal(batch["codes"], codes[batch["index"]])


def line(class_id: object = 1, tokens: object = (0, 1, 2, 3, 4, 1023)) -> bytes:
    return json.dumps({"class_id": class_id, "tokens": tokens}).encode() + b"\n"


BAD_LINES = {
    "short": (line(tokens=[1, 2]), "2 tokens, expected 6"),
    "long": (line(tokens=[1] * 7), "7 tokens, expected 6"),
    "no list": (line(tokens="123456"), "tokens '123456', expected 6"),
    "code too large": (line(tokens=[0, 1, 2, 3, 4, 1024]), "token 1024, expected 0 to 1023"),
    "code negative": (line(tokens=[0, 1, 2, 3, 4, -5]), "token -5, expected 0 to 1023"),
    "code a float": (line(tokens=[0, 1, 2, 3, 4, 5.0]), "token 5.0, expected"),
    "code a bool": (line(tokens=[0, 1, 2, 3, 4, True]), "token True, expected"),
    "code huge": (line(tokens=[0, 1, 2, 3, 4, 2**64 + 5]), "token 1844"),
    "label too large": (line(class_id=10), "class_id 10, expected 0 to 9"),
    "label a string": (line(class_id="3"), "class_id '3', expected"),
    "no label": (b'{"tokens": [0, 1, 2, 3, 4, 5]}\n', "no key 'class_id'"),
    "no tokens": (b'{"class_id": 1}\n', "no key 'tokens'"),
    "no object": (b"[1, 2]\n", "no key 'class_id'"),
    "empty": (b"\n", "empty line"),
    "not JSON": (b'{"class_id": 1, "tokens": [0, 1, 2, 3, 4, 05]}\n', "invalid JSON"),
    "not UTF-8": (b'{"class_id": 1, "tokens": [0, 1, 2, 3, 4, 5], "name": "\xff"}\n', "not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    bad, reason = BAD_LINES[case]
    path = tmp_path / "codes.jsonl"
    good = write_lines(path, *random_samples(LINES_PER_BATCH + 100))
    path.write_bytes(b"".join([*good[: LINES_PER_BATCH + 6], bad, *good[LINES_PER_BATCH + 6 :]]))
    with pytest.raises(InputError) as error:
        open_tokens(path, *SIZES)
    assert str(error.value).startswith(f"{path}: line {LINES_PER_BATCH + 7}: {reason}")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_first_ten_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_bytes(line() * 2 + b"\n" * 11 + line() * 2)
    with pytest.raises(InputError, match=r"line 3: empty line; line 4: .*; line 12: empty line$"):
        open_tokens(path, *SIZES)


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_truncated_last_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_bytes((line() * 8)[: -1 - cut])
    with pytest.raises(InputError, match="line 8: truncated"):
        open_tokens(path, *SIZES)


def test_other_spellings_of_a_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    path.write_bytes(b'{"tokens":[0,1,2,3,4,5],"class_id":7}\r\n' + line() + line()[:-1])
    store = open_tokens(path, *SIZES)
    assert store.class_ids.tolist() == [7, 1, 1]
    assert store.codes[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_fast_and_slow_parser_agree() -> None:
    """Random damage: the fast parser takes nothing that the slow one refuses or reads otherwise."""
    rng = np.random.default_rng(0)
    alphabet = b'0012,,,   \t\r-+.e[]{}"tx\xff'
    taken = refused = 0
    for line in format_lines(*random_samples(10_000)[::-1]).splitlines(keepends=True):
        damaged = bytearray(line)
        assert parse_published_lines([bytes(damaged)], SIZES) is not None
        for _ in range(rng.integers(1, 5)):
            place, byte = rng.integers(len(damaged)), alphabet[rng.integers(len(alphabet))]
            kind = rng.integers(3)
            damaged[place : place + int(kind != 0)] = bytes([byte])[: int(kind != 2)]  # insert, replace or delete
        fast = parse_published_lines([bytes(damaged)], SIZES)
        if fast is None:
            refused += 1
            continue
        taken += 1
        class_id, tokens = parse_line(bytes(damaged), SIZES)
        assert (fast[1][0], fast[0][0].tolist()) == (class_id, tokens)
    assert taken > 100
    assert refused > 1000


@pytest.mark.parametrize(
    "codes", [b"05,3, 1, 2, 3, 4", b"1 2, 3, 4, 5, 6", b", 1, 2, 3, 4, 55", b"11, 2, 3, 4, 5, ", b"05, , 1, 2, 3, 4"]
)
def test_fast_parser_refuses(codes: bytes) -> None:
    assert parse_published_lines([b'{"class_id": 3, "tokens": [' + codes + b"]}\n"], SIZES) is None


def test_writer_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_store(path, *random_samples(10))
    (tmp_path / "a.tokens.tmp").mkdir()
    (tmp_path / "a.tokens.tmp/stale").touch()
    codes, class_ids = random_samples(10, seed=1)
    writer = TokenStoreWriter(path, StoreMeta(6, 1024))
    assert not (tmp_path / "a.tokens.tmp/stale").exists()
    with pytest.raises(AssertionError), writer:
        writer.append(codes, class_ids[:9])
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(TokenStore(path).codes, random_samples(10)[0])
    np.testing.assert_array_equal(write_store(path, codes, class_ids).codes, codes)
    with pytest.raises(InputError, match="no sample"), TokenStoreWriter(tmp_path / "b.tokens", StoreMeta(6, 1024)):
        pass
    with pytest.raises(InputError, match="codebook_size=65537, expected at most 65536"):
        TokenStoreWriter(tmp_path / "b.tokens", StoreMeta(6, 65537))
    assert list(tmp_path.iterdir()) == [path]


def test_largest_codes_survive(tmp_path: Path) -> None:
    codes = np.full((3, 2), 65535)
    with TokenStoreWriter(tmp_path / "a.tokens", StoreMeta(2, 65536, class_names=["x", "y"])) as writer:
        writer.append(codes, np.zeros(3, dtype=np.int64))
    store = TokenStore(tmp_path / "a.tokens")
    assert store[2]["codes"].tolist() == [65535, 65535]
    assert (store.meta.num_classes, store.meta.class_names) == (2, ["x", "y"])


def test_other_sizes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_store(path, *random_samples(50))
    for sizes, message in (
        (SIZES._replace(codebook_size=512), "codebook_size=1024, expected 512"),
        (SIZES._replace(image_seq_len=8), "image_seq_len=6, expected 8"),
        (SIZES._replace(num_classes=9), "10 classes, expected at most 9"),
    ):
        with pytest.raises(InputError, match=message):
            open_tokens(path, *sizes)
    assert len(open_tokens(path, *SIZES._replace(num_classes=20))) == 50


def test_missing_and_damaged_stores(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    with pytest.raises(InputError, match="cannot be opened"):
        open_tokens(path, *SIZES)
    write_store(path, *random_samples(50))
    with pytest.raises(InputError, match=r"no such file; there is .*a\.tokens"):
        open_tokens(tmp_path / "a.jsonl", *SIZES)
    with pytest.raises(InputError, match=r"expected a \.jsonl file or a \.tokens store"):
        open_tokens(tmp_path / "a.json", *SIZES)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="found no line"):
        open_tokens(tmp_path / "empty.jsonl", *SIZES)
    tokens = (path / "tokens.npy").read_bytes()
    (path / "tokens.npy").write_bytes(tokens[:-10])
    with pytest.raises(InputError, match="cannot be opened"):
        open_tokens(path, *SIZES)
    (path / "tokens.npy").write_bytes(tokens)
    np.save(path / "class_ids.npy", np.zeros(49, dtype=np.int32))
    with pytest.raises(InputError, match=r"class_ids.npy: found shape \(49,\), expected \(50,\)"):
        open_tokens(path, *SIZES)
    (path / "meta.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be opened"):
        open_tokens(path, *SIZES)
