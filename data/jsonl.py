"""The published format of tokenized images: a line `{"class_id": 3, "tokens": [1, 2, ...]}` per image."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from utils.errors import InputError

LINES_PER_BATCH = 256
MAX_REPORTED = 10
HEAD, MIDDLE, TAIL = b'{"class_id": ', b', "tokens": [', b"]}\n"

Batch = tuple[np.ndarray, np.ndarray]  # codes (B, N) uint16, class ids (B,) int32


class Sizes(NamedTuple):
    """What codes and class ids must fit."""

    codebook_size: int  # V, at most 65536
    image_seq_len: int  # N
    num_classes: int  # C


@dataclass
class BadLines:
    """What `read_jsonl` found wrong.

    Attributes:
        max_fraction: bad lines up to this share of all are left out; 0: none.
        reasons: line number and reason of the first ones.
    """

    max_fraction: float = 0.0
    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, reasons: list[str]) -> None:
        self.count += len(reasons)
        self.reasons = (self.reasons + reasons)[:MAX_REPORTED]

    def check(self, path: Path, num_lines: int) -> None:
        """
        Raises:
            InputError: more bad lines than allowed; names the file, the lines and the reasons.
        """
        if self.count > self.max_fraction * num_lines:
            allowed = (
                f"{self.count} of {num_lines} lines are bad, dataset.params.max_bad_fraction={self.max_fraction}: "
            )
            raise InputError(f"{path}: {allowed if self.max_fraction else ''}{'; '.join(self.reasons)}")


def read_jsonl(path: Path, sizes: Sizes, bad_lines: BadLines) -> Iterator[Batch]:
    """Read and check the lines in batches, with a progress bar; notes bad lines in `bad_lines`.

    Raises:
        InputError: more bad lines than allowed, after the last line or, if none is allowed, after the tenth bad one.
    """
    first = 1  # number of the batch's first line
    with path.open("rb") as file, tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as bar:
        while lines := list(islice(file, LINES_PER_BATCH)):
            batch = parse_published_lines(lines, sizes)
            if batch is None:
                batch, reasons = _parse_any_lines(lines, first, sizes)
                bad_lines.add(reasons)
            if bad_lines.count >= MAX_REPORTED and not bad_lines.max_fraction:
                break
            if len(batch[0]) and (bad_lines.max_fraction or not bad_lines.count):
                yield batch
            first += len(lines)
            bar.update(sum(map(len, lines)))
    bad_lines.check(path, first - 1)
    if first == 1:
        raise InputError(f"{path}: found no line, expected one per image")


def parse_published_lines(lines: list[bytes], sizes: Sizes) -> Batch | None:
    """All lines at once, several times as fast as `json`; None unless they are valid and as `format_line` writes them.

    The codes must be runs of digits with ", " between them and no other byte; a leading zero would make the text
    longer than its numbers need, which its length shows.
    """
    class_ids, bodies = [], []
    for line in lines:
        class_id, separator, body = line[len(HEAD) :].partition(MIDDLE)
        if not (line.startswith(HEAD) and separator and line.endswith(TAIL)):
            return None
        if not (class_id.isdigit() and len(class_id) < 10) or (class_id[:1] == b"0" and class_id != b"0"):
            return None
        if body.count(b", ") != sizes.image_seq_len - 1:
            return None
        class_ids.append(int(class_id))
        bodies.append(body[: -len(TAIL)])
    text = b", ".join(bodies)
    separators = text.translate(None, delete=b"0123456789")
    if separators != b", " * (len(lines) * sizes.image_seq_len - 1):
        return None
    if b", ," in text or not (text[:1] + text[-1:]).isdigit():  # an empty run
        return None
    codes = np.fromstring(text, dtype=np.int64, sep=",")
    num_digits = len(codes) + sum(np.count_nonzero(codes >= 10**power) for power in range(1, 5))
    if len(text) != num_digits + len(separators):
        return None
    if codes.max() >= sizes.codebook_size or max(class_ids) >= sizes.num_classes:
        return None
    return codes.astype(np.uint16).reshape(len(lines), -1), np.array(class_ids, dtype=np.int32)


def parse_line(line: bytes, sizes: Sizes) -> tuple[int, list[int]]:
    """Class id and codes of one line.

    Raises:
        ValueError: what is wrong with it.
    """
    if not line.strip():
        raise ValueError("empty line")
    try:
        record = json.loads(line.decode())
    except ValueError as error:
        problem = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "invalid JSON"
        raise ValueError(problem if line.endswith(b"\n") else "truncated, the file ends inside it") from error
    for key in ("class_id", "tokens"):
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f"no key {key!r}")
    class_id, tokens = record["class_id"], record["tokens"]
    if not _is_id(class_id, sizes.num_classes):
        raise ValueError(f"class_id {class_id!r:.20}, expected 0 to {sizes.num_classes - 1}")
    if not isinstance(tokens, list) or len(tokens) != sizes.image_seq_len:
        found = f"{len(tokens)} tokens" if isinstance(tokens, list) else f"tokens {tokens!r:.20}"
        raise ValueError(f"{found}, expected {sizes.image_seq_len}")
    if set(map(type, tokens)) != {int} or min(tokens) < 0 or max(tokens) >= sizes.codebook_size:
        token = next(token for token in tokens if not _is_id(token, sizes.codebook_size))
        raise ValueError(f"token {token!r:.20}, expected 0 to {sizes.codebook_size - 1}")
    return class_id, tokens


def _is_id(value: object, count: int) -> bool:
    return type(value) is int and 0 <= value < count  # isinstance would let true and false pass


def _parse_any_lines(lines: list[bytes], first: int, sizes: Sizes) -> tuple[Batch, list[str]]:
    class_ids, codes, bad_lines = [], [], []
    for number, line in enumerate(lines, start=first):
        try:
            class_id, tokens = parse_line(line, sizes)
        except ValueError as error:
            bad_lines.append(f"line {number}: {error}")
        else:
            class_ids.append(class_id)
            codes.append(tokens)
    return (np.array(codes, dtype=np.uint16), np.array(class_ids, dtype=np.int32)), bad_lines


def format_line(class_id: int, codes: np.ndarray) -> bytes:
    return json.dumps({"class_id": int(class_id), "tokens": codes.tolist()}).encode() + b"\n"


def write_jsonl(path: Path, codes: np.ndarray, class_ids: np.ndarray) -> None:
    """Write (n, N) codes and (n,) class ids, with a progress bar; the file appears when it is complete."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        rows = zip(class_ids, codes, strict=True)
        file.writelines(format_line(*row) for row in tqdm(rows, desc=path.name, total=len(codes), unit="line", delay=2))
    partial.replace(path)
