"""The published format of tokenized images: a line `{"class_id": 3, "tokens": [1, 2, ...]}` per image."""

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import InputError

LINES_PER_BATCH = 64  # more fit the processor's cache no longer
MAX_REPORTED = 10
MAX_LABEL_DIGITS = 9
HEAD, MIDDLE, TAIL = b'{"class_id": ', b', "tokens": [', b"]}\n"

Batch = tuple[np.ndarray, np.ndarray]  # codes (B, N) uint16, class ids (B,) int32


class Sizes(NamedTuple):
    """What codes and class ids must fit."""

    codebook_size: int  # V, at most 65536
    image_seq_len: int  # N
    num_classes: int  # C


@dataclass
class BadLines:
    """What was found wrong in a file, in the order of its lines.

    Attributes:
        max_fraction: bad lines up to this share of all are left out; 0: none.
        reasons: line number and reason of the first ones.
    """

    max_fraction: float = 0.0
    num_lines: int = 0  # seen so far
    count: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, num_lines: int, num_bad: int, reasons: list[tuple[int, str]]) -> None:
        """The next lines: how many, how many of them are bad, and the first of these, counted from 0."""
        named = [f"line {self.num_lines + number + 1}: {reason}" for number, reason in reasons]
        self.reasons = (self.reasons + named)[:MAX_REPORTED]
        self.num_lines, self.count = self.num_lines + num_lines, self.count + num_bad

    def check(self, path: Path, complete: bool) -> None:
        """
        Raises:
            InputError: more bad lines than allowed, or no lines at all; before the file is `complete` only if none is
                allowed and there are ten. Names the file, the lines and the reasons.
        """
        if not complete and (self.max_fraction or self.count < MAX_REPORTED):
            return
        if self.count > self.max_fraction * self.num_lines:
            share = f"{self.count} of {self.num_lines} lines are bad, dataset.params.max_bad_fraction="
            allowed = f"{share}{self.max_fraction}: " if self.max_fraction else ""
            raise InputError(f"{path}: {allowed}{'; '.join(self.reasons)}")
        if not self.num_lines:
            raise InputError(f"{path}: found no line, expected one per image")


class LineRange(NamedTuple):
    """The lines of a file whose first byte lies in some range."""

    codes: np.ndarray  # (n, N) uint16, of the good lines
    class_ids: np.ndarray  # (n,) int32
    num_lines: int
    num_bad: int
    reasons: list[tuple[int, str]]  # of the first bad lines: number from 0 within the range, what is wrong


def read_range(path: Path, start: int, stop: int, sizes: Sizes) -> LineRange:
    """Read and check the lines that begin at the bytes `start` to `stop - 1`."""
    batches, num_lines, bad = [_parse_any_lines([], 0, sizes)[0]], 0, []
    with path.open("rb") as file:
        if start:  # the line that a byte before the range belongs to is not ours
            file.seek(start - 1)
            file.readline()
        position = file.tell()
        while position < stop and (lines := list(islice(file, LINES_PER_BATCH))):
            end = position + sum(map(len, lines))
            while end - len(lines[-1]) >= stop:  # begins behind the range
                end -= len(lines.pop())
            batch = parse_published_lines(lines, sizes)
            if batch is None:
                batch, reasons = _parse_any_lines(lines, num_lines, sizes)
                bad += reasons
            batches.append(batch)
            num_lines, position = num_lines + len(lines), end
    codes, class_ids = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return LineRange(codes, class_ids, num_lines, len(bad), bad[:MAX_REPORTED])


def parse_published_lines(lines: list[bytes], sizes: Sizes) -> Batch | None:
    """All lines at once, several times as fast as `json`; None unless they are valid and as `format_lines` writes them.

    The codes must be runs of digits, with commas and spaces in turn between them and no other byte; a leading zero
    would make the text longer than its numbers need, which its length shows.
    """
    class_ids, bodies = [], []
    for line in lines:
        split = line.find(MIDDLE, len(HEAD), len(HEAD) + MAX_LABEL_DIGITS + len(MIDDLE))
        if not (line.startswith(HEAD) and split > 0 and line.endswith(TAIL)):
            return None
        class_id, body = line[len(HEAD) : split], line[split + len(MIDDLE) : -len(TAIL)]
        if not class_id.isdigit() or (class_id[:1] == b"0" and class_id != b"0"):
            return None
        if body.count(b",") != sizes.image_seq_len - 1:
            return None
        class_ids.append(int(class_id))
        bodies.append(body)
    text = b", ".join(bodies)
    num_codes = len(lines) * sizes.image_seq_len
    separators = text.translate(None, delete=b"0123456789")
    if separators != b", " * (num_codes - 1):
        return None
    if b", ," in text or not (text[:1] + text[-1:]).isdigit():  # an empty run
        return None
    try:
        codes = np.fromstring(text, dtype=np.int64, sep=",")
    except ValueError:  # two runs with a space alone between them
        return None
    if len(codes) != num_codes or len(text) != _num_digits(codes, 5) + len(separators):
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


def _parse_any_lines(lines: list[bytes], first: int, sizes: Sizes) -> tuple[Batch, list[tuple[int, str]]]:
    class_ids, codes, bad_lines = [], [], []
    for number, line in enumerate(lines, start=first):
        try:
            class_id, tokens = parse_line(line, sizes)
        except ValueError as error:
            bad_lines.append((number, str(error)))
        else:
            class_ids.append(class_id)
            codes.append(tokens)
    codes = np.array(codes, dtype=np.uint16).reshape(-1, sizes.image_seq_len)
    return (codes, np.array(class_ids, dtype=np.int32)), bad_lines


def format_lines(class_ids: np.ndarray, codes: np.ndarray) -> bytes:
    """Lines of (n,) class ids and (n, N) codes, as `json.dumps` writes them."""
    texts = [str(code) for code in range(int(codes.max()) + 1)]  # looked up faster than formatted
    rows = zip(class_ids.tolist(), codes.tolist(), strict=True)
    lines = (f'{{"class_id": {label}, "tokens": [{", ".join([texts[i] for i in row])}]}}\n' for label, row in rows)
    return "".join(lines).encode()


def formatted_size(class_ids: np.ndarray, codes: np.ndarray) -> int:
    """Bytes of `format_lines`, without formatting."""
    fixed = len(HEAD) + len(MIDDLE) + len(TAIL) + len(", ") * (codes.shape[1] - 1)
    return len(codes) * fixed + _num_digits(class_ids, MAX_LABEL_DIGITS) + _num_digits(codes, 5)


def _num_digits(numbers: np.ndarray, at_most: int) -> int:
    return numbers.size + sum(int(np.count_nonzero(numbers >= 10**power)) for power in range(1, at_most))
