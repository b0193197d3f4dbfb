"""Token store and jsonl: what comes back is what was written, and what is wrong is named."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch_sampler import GlobalBatchSampler, SampleIndex
from data.codes import jsonl
from data.codes.conversion import jsonl_to_store, store_to_jsonl
from data.codes.jsonl import LineParser, Sizes, format_lines, read_range
from data.codes.store_files import StoreMeta
from data.codes.token_store import TokenStore, open_tokens
from data.codes.token_writer import new_token_store
from data.loading import Batches
from utils.errors import InputError

SIZES = Sizes(codebook_size=1024, image_seq_len=6, num_classes=10)


def random_samples(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1024, (count, 6)), rng.integers(0, 10, count)


def write_lines(path: Path, codes: np.ndarray, class_ids: np.ndarray) -> list[bytes]:
    path.write_bytes(format_lines(class_ids, codes))
    return path.read_bytes().splitlines(keepends=True)


def write_store(path: Path, codes: np.ndarray, class_ids: np.ndarray) -> TokenStore:
    with new_token_store(path, StoreMeta(image_seq_len=6, codebook_size=1024)) as writer:
        for start in range(0, len(codes), 7):
            writer.append(codes[start : start + 7], class_ids[start : start + 7])
    return TokenStore(path)


def test_jsonl_is_converted_once_and_comes_back_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "codes.jsonl"
    codes, class_ids = random_samples(70)
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
    batch = store.__getitems__([SampleIndex(5, 3), 0, 39])
    assert all(value.dtype == torch.int64 for value in batch.values())
    np.testing.assert_array_equal(batch["codes"], codes[[5, 0, 39]])
    np.testing.assert_array_equal(batch["class_labels"], class_ids[[5, 0, 39]])
    assert batch["index"].tolist() == [5, 0, 39]
    assert store[5]["codes"].tolist() == codes[5].tolist()
    with pytest.raises(IndexError):
        store[40]
    sampler = GlobalBatchSampler(40, 8, 1, 0, 1, seed=0, first_step=0, last_step=7)
    for workers in (0, 2):
        for batch, draws in zip(Batches(store, sampler, workers), sampler, strict=True):
            assert batch["index"].tolist() == [draw.index for draw in draws]
            np.testing.assert_array_equal(batch["codes"], codes[batch["index"]])


def line(class_id: object = 1, tokens: object = (0, 1, 2, 3, 4, 1023)) -> bytes:
    return json.dumps({"class_id": class_id, "tokens": tokens}).encode() + b"\n"


# Per case: a bad line, and what the message must name.
BAD_LINES = {
    "short": (line(tokens=[1, 2]), "length 6 - at `$.tokens`"),
    "long": (line(tokens=[1] * 7), "length 6 - at `$.tokens`"),
    "no list": (line(tokens="123456"), "`$.tokens`"),
    "code too large": (line(tokens=[0, 1, 2, 3, 4, 1024]), "`int` <= 1023 - at `$.tokens[5]`"),
    "code negative": (line(tokens=[0, -5, 2, 3, 4, 5]), "`int` >= 0 - at `$.tokens[1]`"),
    "code a float": (line(tokens=[0, 1, 2, 3, 4, 5.0]), "`$.tokens[5]`"),
    "code a bool": (line(tokens=[0, 1, 2, 3, 4, True]), "`$.tokens[5]`"),
    "code a string": (line(tokens=["0", 1, 2, 3, 4, 5]), "`$.tokens[0]`"),
    "code huge": (line().replace(b"1023", b"9" * 5000), "`$.tokens[5]`"),
    "code NaN": (line(tokens=[0, 1, 2, 3, 4, float("nan")]), "byte 42"),
    "label too large": (line(class_id=10), "`int` <= 9 - at `$.class_id`"),
    "label a string": (line(class_id="3"), "`$.class_id`"),
    "no label": (b'{"tokens": [0, 1, 2, 3, 4, 5]}\n', "`class_id`"),
    "no tokens": (b'{"class_id": 1}\n', "`tokens`"),
    "no object": (b"[1]\n", "`object`"),
    "empty": (b"\n", "empty line"),
    "two objects": (line()[:-1] + line(), "trailing characters (byte 49)"),
    "byte order mark": (b"\xef\xbb\xbf" + line(), "byte 0"),
    "not UTF-8": (b'{"class_id": 1, "name": "\xff", "tokens": [0, 1, 2, 3, 4, 5]}\n', "not UTF-8: byte 25"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    bad, named = BAD_LINES[case]
    path = tmp_path / "codes.jsonl"
    good = write_lines(path, *random_samples(100))
    path.write_bytes(b"".join([*good[:6], bad, *good[6:]]))
    with pytest.raises(InputError) as error:
        open_tokens(path, *SIZES)
    assert str(error.value).startswith(f"{path}: line 7: ")
    assert named in str(error.value)
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
    spaces = line().replace(b" ", b" " * 10_000)
    more_keys = b'{"class_id": 2, "name": "\xc3\xbc", "x": [1.5, null], "tokens": [0, 1, 2, 3, 4, -0]}\n'
    path.write_bytes(b'{"tokens":[0,1,2,3,4,5],"class_id":7}\r\n' + spaces + more_keys + line()[:-1])
    store = open_tokens(path, *SIZES)
    assert store.class_ids.tolist() == [7, 1, 2, 1]
    assert store.codes.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 1023],
        [0, 1, 2, 3, 4, 0],
        store.codes[1].tolist(),
    ]


@pytest.mark.parametrize("first_bytes", [b"", line() * 3])
def test_a_file_without_line_ends_is_refused_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_bytes: bytes
) -> None:
    """A JSON array on one line: neither its own range nor a later one reads all of it."""
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "codes.jsonl"
    path.write_bytes(first_bytes + b"[" + line()[:-1] * 1000 + b"]")
    for start in (0, 20_000):
        place = start - 1 if start else len(first_bytes)
        with pytest.raises(
            InputError, match=rf"codes\.jsonl: no line ends within 1000 bytes from byte {place}, expected"
        ):
            read_range(path, start, start + 10_000, SIZES)


def test_parser_agrees_with_json() -> None:
    """Random damage: what is taken is what `json` reads, and integers in range; what is refused breaks a rule."""
    rng = np.random.default_rng(0)
    alphabet = b'0012,,,   \t\r-+.e[]{}"tx\xff'
    parser, taken, refused = LineParser(SIZES), 0, 0
    for published in format_lines(*random_samples(5_000)[::-1]).splitlines(keepends=True):
        damaged = bytearray(published)
        for _ in range(rng.integers(1, 5)):
            place, byte = rng.integers(len(damaged)), alphabet[rng.integers(len(alphabet))]
            kind = rng.integers(3)
            damaged[place : place + int(kind != 0)] = bytes([byte])[: int(kind != 2)]  # insert, replace or delete
        expected = read_with_json(bytes(damaged))
        try:
            found = parser.parse(bytes(damaged))
        except ValueError:
            found = None
        assert found == expected, bytes(damaged)
        taken, refused = taken + (found is not None), refused + (found is None)
    assert taken > 100
    assert refused > 1000


def read_with_json(text: bytes) -> tuple[int, tuple[int, ...]] | None:
    try:
        record = json.loads(text.decode())
        class_id, tokens = record["class_id"], tuple(record["tokens"])
    except (ValueError, KeyError, TypeError):
        return None
    good = len(tokens) == 6 and {type(value) for value in (class_id, *tokens)} == {int}
    return (class_id, tokens) if good and 0 <= class_id < 10 and 0 <= min(tokens) <= max(tokens) < 1024 else None


def test_writer_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_store(path, *random_samples(10))
    (tmp_path / "a.tokens.tmp").mkdir()
    (tmp_path / "a.tokens.tmp/stale").touch()
    codes, class_ids = random_samples(10, seed=1)
    with pytest.raises(AssertionError), new_token_store(path, StoreMeta(6, 1024)) as writer:
        writer.append(codes, class_ids[:9])
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(TokenStore(path).codes, random_samples(10)[0])
    np.testing.assert_array_equal(write_store(path, codes, class_ids).codes, codes)
    with pytest.raises(InputError, match="no sample"), new_token_store(tmp_path / "b.tokens", StoreMeta(6, 1024)):
        pass
    too_large = 2**32 + 1
    with pytest.raises(InputError, match="codebook_size=4294967297, expected at most 4294967296"):
        new_token_store(tmp_path / "b.tokens", StoreMeta(6, too_large)).__enter__()
    (tmp_path / "c.jsonl").write_bytes(line())
    with pytest.raises(InputError, match=r"c\.tokens: codebook_size=4294967297, expected at most 4294967296"):
        jsonl_to_store(tmp_path / "c.jsonl", tmp_path / "c.tokens", SIZES._replace(codebook_size=too_large), 1)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "c.jsonl"]


@pytest.mark.parametrize(
    ("codebook_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32), (2**18, np.uint32), (2**32, np.uint32)]
)
def test_largest_codes_survive(tmp_path: Path, codebook_size: int, dtype: type) -> None:
    """Through a store, a jsonl and a store made from that."""
    largest = codebook_size - 1
    with new_token_store(tmp_path / "a.tokens", StoreMeta(2, codebook_size, class_names=["x", "y"])) as writer:
        writer.append(np.full((3, 2), largest), np.zeros(3, dtype=np.int64))
    store = TokenStore(tmp_path / "a.tokens")
    assert store.codes.dtype == dtype
    assert store[2]["codes"].tolist() == [largest, largest]
    assert (store.meta.num_classes, store.meta.class_names) == (2, ["x", "y"])
    store_to_jsonl(store.path, tmp_path / "b.jsonl", 1)
    again = open_tokens(tmp_path / "b.jsonl", codebook_size=codebook_size, image_seq_len=2, num_classes=2)
    np.testing.assert_array_equal(again.codes, store.codes)
    assert again.codes.dtype == dtype
    wrong = json.dumps({"class_id": 0, "tokens": [0, codebook_size]})
    (tmp_path / "c.jsonl").write_text(wrong + "\n")
    with pytest.raises(InputError, match=rf"line 1: .*found {codebook_size}"):
        open_tokens(tmp_path / "c.jsonl", codebook_size=codebook_size, image_seq_len=2, num_classes=2)


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


@pytest.mark.parametrize(
    ("name", "array", "found"),
    [
        ("tokens", np.zeros((50, 6), dtype=np.int64), "<i8, expected <u2"),
        ("tokens", np.zeros((50, 6), dtype=np.uint16, order="F"), "<u2 in Fortran order"),
        ("tokens", np.zeros((50, 6), dtype=">u2"), ">u2, expected <u2"),
        ("class_ids", np.zeros(50), "<f8, expected <i4"),
    ],
)
def test_arrays_whose_rows_would_be_read_wrongly(tmp_path: Path, name: str, array: np.ndarray, found: str) -> None:
    write_store(tmp_path / "a.tokens", *random_samples(50))
    np.save(tmp_path / f"a.tokens/{name}.npy", array)
    with pytest.raises(InputError, match=rf"{name}\.npy: found .*{found}"):
        TokenStore(tmp_path / "a.tokens")


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("tokens", np.full((50, 6), 1024, dtype=np.uint16), "codes from 1024 to 1024 .*, expected 0 to 1023"),
        ("class_ids", np.full(50, -1, dtype=np.int32), "class_labels from -1 to -1 .*, expected 0 to 9"),
        ("class_ids", np.full(50, 10, dtype=np.int32), "class_labels from 10 to 10"),
    ],
)
def test_samples_that_the_model_does_not_have(tmp_path: Path, name: str, values: np.ndarray, found: str) -> None:
    """On a GPU a code above the codebook would be read as a class."""
    write_store(tmp_path / "a.tokens", *random_samples(50))
    np.save(tmp_path / f"a.tokens/{name}.npy", values)
    store = TokenStore(tmp_path / "a.tokens")
    with pytest.raises(InputError, match=rf"a\.tokens: found {found}"):
        store.__getitems__([3, 7])


@pytest.mark.parametrize(
    "change", [{"image_seq_len": "6"}, {"class_names": 3}, {"sha256": [1]}, {"settings": [1]}, {"unknown": 1}]
)
def test_a_meta_of_other_types(tmp_path: Path, change: dict) -> None:
    write_store(tmp_path / "a.tokens", *random_samples(50))
    meta = tmp_path / "a.tokens/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    with pytest.raises(InputError, match=r"cannot be opened as a token store: .*" + next(iter(change))):
        TokenStore(tmp_path / "a.tokens")
