"""The published format of tokenized images: a line `{"class_id": 3, "tokens": [1, 2, ...]}` per image."""

import json
import re
import struct
from codecs import BOM_UTF8
from dataclasses import dataclass, field
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, BinaryIO, NamedTuple

import msgspec
import numpy as np

from utils.errors import InputError, errors_name
from utils.token_ids import LARGE_CODEBOOK, token_dtype

MAX_LINE_BYTES = 2**24  # far above published lines: a file that is one long line must not fill the memory
READ_BYTES = 2**18  # at once
MAX_REPORTED = 10
MAX_LABEL_DIGITS = 9
HEAD, MIDDLE, TAIL = '{"class_id": ', ', "tokens": [', "]}\n"


class Sizes(NamedTuple):
    """Limits of token ids and class ids."""

    codebook_size: int  # V, at most 2^32
    image_seq_len: int  # N
    num_classes: int  # C


@dataclass
class BadLines:
    """The bad lines of a file, counted in the order of the file."""

    max_fraction: float = 0.0  # share of bad lines that may be left out
    num_lines: int = 0  # seen so far, good or bad
    count: int = 0
    reasons: list[str] = field(default_factory=list)  # of the first ones, with their line number

    def add(self, num_lines: int, num_bad: int, reasons: list[tuple[int, str]]) -> None:
        """Count more lines; `reasons` pairs the number of a bad line among them, from 0, with its problem."""
        named = [f"line {self.num_lines + number + 1}: {reason}" for number, reason in reasons]
        self.reasons = (self.reasons + named)[:MAX_REPORTED]
        self.num_lines += num_lines
        self.count += num_bad

    def check(self, path: Path, complete: bool) -> None:
        """Raise InputError for too many bad lines or no lines; in an incomplete file, for MAX_REPORTED bad lines."""
        if not complete and (self.max_fraction or self.count < MAX_REPORTED):
            return
        if self.count > self.max_fraction * self.num_lines:
            share = f"{self.count} of {self.num_lines} lines are bad, dataset.params.max_bad_fraction="
            allowed = f"{share}{self.max_fraction}: " if self.max_fraction else ""
            raise InputError(f"{path}: {allowed}{'; '.join(self.reasons)}")
        if not self.num_lines:
            raise InputError(f"{path}: found no line, expected one per image")


class LineRange(NamedTuple):
    """The lines of a file whose first byte is in a given range."""

    codes: np.ndarray  # (n, N) of `token_dtype`, of the good lines
    class_ids: np.ndarray  # (n,) int32
    num_lines: int
    num_bad: int
    reasons: list[tuple[int, str]]  # of the first bad lines: number from 0 within the range, reason


def read_range(path: Path, start: int, stop: int, sizes: Sizes) -> LineRange:
    """Read and check the lines that begin at the bytes `start` to `stop - 1`; bad lines are counted, not raised. Raises
    InputError for a line longer than MAX_LINE_BYTES."""
    parser = LineParser(sizes)
    dtype = token_dtype(sizes.codebook_size)
    row = struct.Struct(f"{sizes.image_seq_len}{dtype.char}")
    rows = bytearray()
    class_ids: list[int] = []
    reasons: list[tuple[int, str]] = []
    num_lines = num_bad = 0
    with errors_name(path), path.open("rb", buffering=READ_BYTES) as file:
        if start:  # skip the line that contains the byte before the range
            file.seek(start - 1)
            _next_line(file, path)
        position = file.tell()
        while position < stop and (line := _next_line(file, path)):
            try:
                class_id, tokens = parser.parse(line.removeprefix(BOM_UTF8) if position == 0 else line)
            except ValueError as error:
                num_bad += 1
                if num_bad <= MAX_REPORTED:
                    reasons.append((num_lines, str(error)))
            else:
                class_ids.append(class_id)
                rows += row.pack(*tokens)  # faster than np.array of the list
            num_lines += 1
            position += len(line)
    codes = np.frombuffer(rows, dtype=dtype).reshape(-1, sizes.image_seq_len)
    return LineRange(codes, np.array(class_ids, dtype=np.int32), num_lines, num_bad, reasons)


def _next_line(file: BinaryIO, path: Path) -> bytes:
    line = file.readline(MAX_LINE_BYTES)
    if len(line) == MAX_LINE_BYTES:
        first = file.tell() - len(line)
        raise InputError(
            f"{path}: no line ends within {MAX_LINE_BYTES} bytes from byte {first}, expected one per image"
        )
    return line


class LineParser:
    """Parses lines; accepts integers only, no floats, booleans or strings."""

    def __init__(self, sizes: Sizes) -> None:
        class_id = Annotated[int, msgspec.Meta(ge=0, lt=sizes.num_classes)]
        token = Annotated[int, msgspec.Meta(ge=0, lt=sizes.codebook_size)]
        fields: list[tuple[str, Any]] = [
            ("class_id", class_id),
            ("tokens", GenericAlias(tuple, (token,) * sizes.image_seq_len)),
        ]
        self._decode = msgspec.json.Decoder(msgspec.defstruct("Line", fields)).decode

    def parse(self, line: bytes) -> tuple[int, tuple[int, ...]]:
        """Class id and token ids of one line; other keys are ignored. Raises ValueError for a bad line."""
        try:
            record: Any = self._decode(line.decode())  # msgspec does not check the UTF-8 of ignored keys
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte {error.start} is {line[error.start : error.start + 1]!r}") from error
        except msgspec.DecodeError as error:
            if not line.strip():
                raise ValueError("empty line") from error
            if "truncated" in str(error) and not line.endswith(b"\n"):
                raise ValueError("truncated, the file ends inside it") from error
            raise ValueError(f"{error}{_found(line, str(error))}") from error
        return record.class_id, record.tokens


def _found(line: bytes, problem: str) -> str:
    """What the line holds at the path that msgspec names, such as `$.tokens[15]`."""
    path = re.search(r"`\$\.(\w+)(?:\[(\d+)\])?`$", problem)
    if path is None:
        return ""
    try:
        value = json.loads(line)[path[1]]
    except ValueError:  # an integer with thousands of digits
        return ""
    if path[2]:
        value = value[int(path[2])]
    return f", found {f'{len(value)} values' if isinstance(value, list) else repr(value)}"


def format_lines(class_ids: np.ndarray, codes: np.ndarray) -> bytes:
    """Lines of (n,) class ids and (n, N) codes, as `json.dumps` writes them."""
    largest = int(codes.max())
    if largest < LARGE_CODEBOOK:  # a table is faster than formatting; a large one is slower
        texts = [str(code) for code in range(largest + 1)]
        rows = (", ".join([texts[code] for code in row]) for row in codes.tolist())
    else:
        rows = (str(row)[1:-1] for row in codes.tolist())
    lines = (f"{HEAD}{label}{MIDDLE}{row}{TAIL}" for label, row in zip(class_ids.tolist(), rows, strict=True))
    return "".join(lines).encode()


def formatted_size(class_ids: np.ndarray, codes: np.ndarray) -> int:
    """Length of `format_lines` in bytes, computed without formatting."""
    fixed = len(HEAD) + len(MIDDLE) + len(TAIL) + len(", ") * (codes.shape[1] - 1)
    return (
        len(codes) * fixed
        + _num_digits(class_ids, MAX_LABEL_DIGITS)
        + _num_digits(codes, len(str(np.iinfo(codes.dtype).max)))
    )


def _num_digits(numbers: np.ndarray, at_most: int) -> int:
    return numbers.size + sum(int(np.count_nonzero(numbers >= 10**power)) for power in range(1, at_most))
