"""From jsonl to a token store and back: on all CPUs, and killed conversions go on where they were.

From a jsonl to a store, the lines of each range of bytes are checked and written to a part file, and the store is
joined from the parts. From a store to a jsonl, the lengths of all lines are known beforehand, so the lines of each
range of rows are written to their final offset at once.
"""

import json
import os
from contextlib import closing
from itertools import accumulate
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.codes.jsonl import BadLines, Sizes, format_lines, formatted_size, read_range
from data.codes.store_files import StoreMeta, check_codebook_size, open_store, write_meta
from data.codes.token_writer import new_token_store
from utils.errors import InputError
from utils.faults import fault_point
from utils.files.atomic import publish
from utils.files.chunk_files import ChunkFiles
from utils.files.hashing import hash_of, range_sha256
from utils.processes import in_processes

RANGE_BYTES = 2**25  # of a jsonl per part; a process needs a few times that memory
ROWS_PER_BLOCK = 16_384  # of a store per part


def describe_source(jsonl: Path, range_hashes: list[str] | None = None) -> dict[str, Any]:
    """What tells whether a jsonl is still the one that a store was made from: its content, and size and time, which
    spare reading it as long as they are the same.

    Args:
        range_hashes: of all its ranges of RANGE_BYTES, if they are known; else the file is read.
    """
    status = jsonl.stat()
    if range_hashes is None:
        ranges = tqdm(range(0, status.st_size, RANGE_BYTES), desc=f"sha256 {jsonl.name}", unit="part", delay=2)
        range_hashes = [range_sha256(jsonl, start, start + RANGE_BYTES) for start in ranges]
    facts = {"name": jsonl.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    return facts | {"sha256": hash_of({"ranges": range_hashes})}


def is_source(source: dict[str, Any] | None, jsonl: Path) -> bool:
    """Whether a store's `source` describes this jsonl as it is now, whatever its name and time."""
    if source is None:
        return False
    status = jsonl.stat()
    if source["size"] != status.st_size:
        return False
    if source["name"] == jsonl.name and source["mtime_ns"] == status.st_mtime_ns:
        return True
    return "sha256" in source and describe_source(jsonl)["sha256"] == source["sha256"]


def jsonl_to_store(
    jsonl: Path,
    store_path: Path,
    sizes: Sizes,
    processes: int,
    max_bad_fraction: float = 0.0,
    crops_per_image: int = 1,
    class_names: list[str] | None = None,
) -> BadLines:
    """Check all lines and write them as a token store, which appears when it is complete.

    Until then its parts, of the same size, lie in `<store>.lines/`.

    Args:
        max_bad_fraction: bad lines up to this share of all are left out.
        crops_per_image: consecutive lines that are of one image.
        class_names: in the order of the class ids.

    Returns:
        What was left out.

    Raises:
        InputError: more bad lines than allowed, of which it names the first ten, or lines that do not make whole
            images. Nothing is left.
    """
    check_codebook_size(store_path, sizes.codebook_size)
    status = jsonl.stat()
    parts = ChunkFiles(store_path.with_name(store_path.name + ".lines"), status.st_size, RANGE_BYTES, ".npz")
    bad_lines = BadLines(max_bad_fraction)
    if not parts.blocks:
        bad_lines.check(jsonl, complete=True)
    facts = {"name": jsonl.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    parts.claim_anew({**facts, **sizes._asdict(), "range": RANGE_BYTES})
    try:
        source = describe_source(jsonl, _convert_ranges(jsonl, parts, sizes, bad_lines, processes))
        if bad_lines.num_lines % crops_per_image:
            raise InputError(f"{jsonl}: found {bad_lines.num_lines} lines, expected {crops_per_image} of each image")
    except InputError:
        parts.remove()
        raise
    of_jsonl = crops_per_image, class_names, source, bad_lines.count, edge_of_square(sizes.image_seq_len)
    fields = StoreMeta(sizes.image_seq_len, sizes.codebook_size, *of_jsonl)
    fault_point("join.begin", 0)
    with new_token_store(store_path, fields) as writer:
        for block in tqdm(parts.blocks, desc=store_path.name, unit="part", delay=2):
            with np.load(parts.path(block)) as part:
                writer.append(part["codes"], part["class_ids"])
        fault_point("join.end", 0)
    parts.remove()
    return bad_lines


def edge_of_square(image_seq_len: int) -> int | None:
    """Of a grid that so many codes would fill; None: of none."""
    edge = isqrt(image_seq_len)
    return edge if edge**2 == image_seq_len else None


def is_conversion(store_path: Path, jsonl: Path, sizes: Sizes, max_bad_fraction: float) -> bool:
    """Whether a store is there that was made from this jsonl as it is now, under the same rules; False means that one
    is to be made, where nothing but an older conversion is lost.

    Raises:
        InputError: a store of this name that was not made from this file.
    """
    if not store_path.is_dir():
        return False
    meta = open_store(store_path)[0]
    same, skipped = is_source(meta.source, jsonl), meta.num_skipped
    follows_rules = skipped <= max_bad_fraction * (meta.num_samples + skipped)
    fits = follows_rules and meta.sha256 is not None and meta.codebook_size == sizes.codebook_size
    if meta.source is not None and same and fits:
        if (now := {**meta.source, "name": jsonl.name, "mtime_ns": jsonl.stat().st_mtime_ns}) != meta.source:
            meta.source = now  # the next start need not read it
            write_meta(store_path, meta)
        return True
    if meta.source is None or meta.tokenizer_sha256 is not None:  # no conversion, or one that knows more than a jsonl
        raise InputError(
            f"{store_path}: not made from {jsonl} as it is now; train on the store, or delete or rename it"
        )
    return False


def _convert_ranges(jsonl: Path, parts: ChunkFiles, sizes: Sizes, bad_lines: BadLines, processes: int) -> list[str]:
    """Make the missing parts; count bad lines in the order of the file, as far as it is read without a gap.

    Returns:
        The hash of each range.
    """
    range_hashes: list[str] = []
    missing, counted, size = parts.missing(), 0, parts.blocks[-1].stop
    pending = {block.start for block in missing}

    def convert(block: range) -> None:
        lines = read_range(jsonl, block.start, block.stop, sizes)
        with parts.writing(block) as partial, partial.open("wb") as file:
            digest = range_sha256(jsonl, block.start, block.stop)
            counts = json.dumps([lines.num_lines, lines.num_bad, lines.reasons, digest])
            np.savez(file, codes=lines.codes, class_ids=lines.class_ids, counts=counts)

    def count_ready() -> None:
        nonlocal counted
        while counted < len(parts.blocks) and parts.blocks[counted].start not in pending:
            with np.load(parts.path(parts.blocks[counted])) as part:
                *counts, digest = json.loads(str(part["counts"]))
            bad_lines.add(*counts)
            range_hashes.append(digest)
            counted += 1
        bad_lines.check(jsonl, complete=counted == len(parts.blocks))

    count_ready()
    initial = size - sum(map(len, missing))
    with (
        tqdm(total=size, initial=initial, desc=jsonl.name, unit="B", unit_scale=True) as progress,
        closing(in_processes(convert, missing, processes)) as blocks,
    ):
        for block in blocks:
            pending.remove(block.start)
            progress.update(len(block))
            count_ready()
    return range_hashes


def store_to_jsonl(store_path: Path, jsonl: Path, processes: int) -> int:
    """Write the samples as jsonl, unless that has been done; the file appears when it is complete, and until then it
    lies in `<jsonl>.rows/`.

    A store beside it notes that it is the conversion of that file.

    Returns:
        Number of samples.

    Raises:
        InputError: no store there, a damaged one, or another file under that name.
    """
    meta, codes, class_ids = open_store(store_path)
    parts = ChunkFiles(jsonl.with_name(jsonl.name + ".rows"), len(codes), ROWS_PER_BLOCK, ".done")
    sizes = [formatted_size(class_ids[b.start : b.stop], codes[b.start : b.stop]) for b in parts.blocks]
    growing = parts.folder / "growing.jsonl"
    if jsonl.exists():
        published = parts.folder.exists() and not growing.exists()  # by a run that was killed then
        if jsonl.stat().st_size != sum(sizes) or not (published or is_source(meta.source, jsonl)):
            raise InputError(f"{jsonl}: exists and is not {store_path} as jsonl; delete it or choose another name")
    else:
        parts.claim_anew({"codes": meta.fingerprint, "rows": ROWS_PER_BLOCK})
        growing.open("ab").close()
        _write_rows(growing, codes, class_ids, parts, sizes, processes)
        fault_point("join.begin", 0)
        publish(growing, jsonl)
        fault_point("join.end", 0)
    if jsonl.with_suffix(".tokens") == store_path:
        meta.source = describe_source(jsonl)
        write_meta(store_path, meta)
    parts.remove()
    return len(codes)


def _write_rows(
    growing: Path, codes: np.ndarray, class_ids: np.ndarray, parts: ChunkFiles, sizes: list[int], processes: int
) -> None:
    """The missing parts, each to its place in the growing jsonl.

    Args:
        sizes: bytes of each part.
    """
    offsets = dict(zip(parts.blocks, accumulate(sizes, initial=0), strict=False))

    def convert(block: range) -> None:
        text = format_lines(class_ids[block.start : block.stop], codes[block.start : block.stop])
        with parts.writing(block) as marker, growing.open("r+b") as file:
            file.seek(offsets[block])
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            marker.touch()

    missing = parts.missing()
    finished, name = len(codes) - sum(map(len, missing)), parts.folder.stem
    with (
        tqdm(total=len(codes), initial=finished, desc=name, unit="line", unit_scale=True, delay=2) as progress,
        closing(in_processes(convert, missing, processes)) as blocks,
    ):
        for block in blocks:
            progress.update(len(block))
