"""The published format of tokenized images: a line `{"class_id": 3, "tokens": [1, 2, ...]}` per image."""

import codecs
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, BinaryIO, NamedTuple

import msgspec
import numpy as np

from utils.errors import InputError

MAX_LINE_BYTES = 2**24  # ten thousand times the published lines; a file that is one long line does not fill the memory
READ_BYTES = 2**18  # at once
MAX_REPORTED = 10
MAX_LABEL_DIGITS = 9
HEAD, MIDDLE, TAIL = '{"class_id": ', ', "tokens": [', "]}\n"
VALUE_PLACE = re.compile(r"at `\$\.(class_id|tokens)(?:\[(\d+)\])?")  # in msgspec's messages


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
    """Read and check the lines that begin at the bytes `start` to `stop - 1`.

    Raises:
        InputError: a line that is longer than MAX_LINE_BYTES; bad lines are counted instead.
    """
    parser, row = LineParser(sizes), struct.Struct(f"{sizes.image_seq_len}H")
    rows, class_ids, num_lines, num_bad, reasons = bytearray(), [], 0, 0, []
    with path.open("rb", buffering=READ_BYTES) as file:
        if start:  # the line that a byte before the range belongs to is not ours
            file.seek(start - 1)
            _next_line(file, path)
        position = file.tell()
        while position < stop and (line := _next_line(file, path)):
            try:
                class_id, tokens = parser.parse(line)
            except ValueError as error:
                num_bad += 1
                if num_bad <= MAX_REPORTED:
                    reasons.append((num_lines, str(error)))
            else:
                class_ids.append(class_id)
                rows += row.pack(*tokens)  # faster than np.array of the list
            num_lines, position = num_lines + 1, position + len(line)
    codes = np.frombuffer(rows, dtype=np.uint16).reshape(-1, sizes.image_seq_len)
    return LineRange(codes, np.array(class_ids, dtype=np.int32), num_lines, num_bad, reasons)


def _next_line(file: BinaryIO, path: Path) -> bytes:
    line = file.readline(MAX_LINE_BYTES)
    if len(line) == MAX_LINE_BYTES:
        place = file.tell() - len(line)
        raise InputError(
            f"{path}: no line ends within {MAX_LINE_BYTES} bytes from byte {place}, expected one per image"
        )
    return line


class LineParser:
    """Takes integers only: no float, even without a fraction, no true or false, no text."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        class_id = Annotated[int, msgspec.Meta(ge=0, lt=sizes.num_classes)]
        token = Annotated[int, msgspec.Meta(ge=0, lt=sizes.codebook_size)]
        fields: list[tuple[str, Any]] = [
            ("class_id", class_id),
            ("tokens", GenericAlias(tuple, (token,) * sizes.image_seq_len)),
        ]
        self._decode = msgspec.json.Decoder(msgspec.defstruct("Line", fields)).decode

    def parse(self, line: bytes) -> tuple[int, tuple[int, ...]]:
        """Class id and codes of one line; keys besides these two are ignored.

        Raises:
            ValueError: what is wrong with it, where, what was found there and what was expected.
        """
        try:
            record: Any = self._decode(line.decode())  # msgspec alone lets broken UTF-8 in ignored keys pass
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte {error.start} is {line[error.start : error.start + 1]!r}") from error
        except msgspec.DecodeError as error:
            raise ValueError(_describe(error, line, self.sizes)) from error
        if repeated := _repeated_key(line):
            raise ValueError(repeated)
        return record.class_id, record.tokens


def _repeated_key(line: bytes) -> str:
    """msgspec, as most readers, would take the last of them without a word."""
    end = line.rfind(b'"') + 1
    for key in (b'"class_id"', b'"tokens"'):
        if (count := line.count(key, 0, end)) > 1:
            return f"{count} times the key {key.decode()}, expected once"
    return ""


def _describe(error: msgspec.DecodeError, line: bytes, sizes: Sizes) -> str:
    """msgspec names the place in a line, not what it found there."""
    if not line.strip():
        return "empty line"
    if line.startswith(codecs.BOM_UTF8):
        return "begins with a byte order mark, expected none"
    if not isinstance(error, msgspec.ValidationError):
        truncated = "truncated" in str(error) and not line.endswith(b"\n")
        return "truncated, the file ends inside it" if truncated else f"invalid JSON: {error}"
    if repeated := _repeated_key(line):
        return repeated
    place = VALUE_PLACE.search(str(error))
    if place is None:
        return str(error)  # no object, or a key is missing
    key, position = place.groups()
    try:
        value = json.loads(line)[key]
        value = value if position is None else value[int(position)]
    except (ValueError, LookupError, TypeError):  # broken further on, thousands of digits, a key twice with escapes
        return str(error)
    if key == "class_id":
        return f"class_id is {value!r:.20}, expected an integer from 0 to {sizes.num_classes - 1}"
    if position is not None:
        return f"tokens[{position}] is {value!r:.20}, expected an integer from 0 to {sizes.codebook_size - 1}"
    found = f"{len(value)} tokens" if isinstance(value, list) else f"tokens is {value!r:.20}"
    return f"{found}, expected {sizes.image_seq_len}"


def format_lines(class_ids: np.ndarray, codes: np.ndarray) -> bytes:
    """Lines of (n,) class ids and (n, N) codes, as `json.dumps` writes them."""
    texts = [str(code) for code in range(int(codes.max()) + 1)]  # looked up faster than formatted
    rows = zip(class_ids.tolist(), codes.tolist(), strict=True)
    lines = (f"{HEAD}{label}{MIDDLE}{', '.join([texts[i] for i in row])}{TAIL}" for label, row in rows)
    return "".join(lines).encode()


def formatted_size(class_ids: np.ndarray, codes: np.ndarray) -> int:
    """Bytes of `format_lines`, without formatting."""
    fixed = len(HEAD) + len(MIDDLE) + len(TAIL) + len(", ") * (codes.shape[1] - 1)
    return len(codes) * fixed + _num_digits(class_ids, MAX_LABEL_DIGITS) + _num_digits(codes, 5)


def _num_digits(numbers: np.ndarray, at_most: int) -> int:
    return numbers.size + sum(int(np.count_nonzero(numbers >= 10**power)) for power in range(1, at_most))
