"""From jsonl to a token store and back, on all CPUs; the same call resumes a killed conversion.

From jsonl to store, processes check the lines of each chunk of bytes and write a chunk file; the store is joined from
the chunk files. From store to jsonl, the length of every line follows from its values, so the lines of each chunk of
rows are written at their final offset.
"""

import json
from contextlib import closing, suppress
from itertools import accumulate
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.codes.jsonl import BadLines, Sizes, format_lines, formatted_size, read_range
from data.codes.store_files import StoreMeta, check_codebook_size, open_store, write_meta
from data.codes.token_writer import new_token_store
from utils.errors import InputError, errors_name
from utils.faults import fault_point
from utils.files.atomic import publish, sync
from utils.files.chunk_files import ChunkFiles
from utils.files.hashing import hash_of, range_sha256
from utils.processes import in_processes

CHUNK_BYTES = 2**25  # of a jsonl; a process needs a few times that memory
CHUNK_ROWS = 16_384  # of a store


def describe_source(jsonl: Path, chunk_hashes: list[str] | None = None) -> dict[str, Any]:
    """The `source` of a store: the jsonl's hash, and its name, size and time, with which an unchanged file need not
    be hashed again.

    Args:
        chunk_hashes: hashes of all chunks of CHUNK_BYTES; None: read the file.
    """
    status = jsonl.stat()
    if chunk_hashes is None:
        starts = tqdm(range(0, status.st_size, CHUNK_BYTES), desc=f"sha256 {jsonl.name}", unit="chunk", delay=2)
        chunk_hashes = [range_sha256(jsonl, start, start + CHUNK_BYTES) for start in starts]
    return {
        "name": jsonl.name,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": hash_of({"ranges": chunk_hashes}),
    }


def is_source(source: dict[str, Any] | None, jsonl: Path) -> bool:
    """Whether the `source` of a store describes the present content of `jsonl`."""
    if source is None:
        return False
    status = jsonl.stat()
    if source["size"] != status.st_size:
        return False
    if source["name"] == jsonl.name and source["mtime_ns"] == status.st_mtime_ns:
        return True
    return "sha256" in source and describe_source(jsonl)["sha256"] == source["sha256"]


def is_conversion(store_path: Path, jsonl: Path, sizes: Sizes, max_bad_fraction: float) -> bool:
    """Whether the store was converted from the present content of `jsonl` with the same settings; if not, it is missing
    or outdated and may be replaced. Raises InputError for a store that was not converted from this file."""
    if not store_path.is_dir():
        return False
    meta = open_store(store_path)[0]
    max_skipped = max_bad_fraction * (meta.num_samples + meta.num_skipped)
    follows_rules = meta.num_skipped <= max_skipped and meta.codebook_size == sizes.codebook_size
    if meta.source is not None and is_source(meta.source, jsonl) and follows_rules and meta.sha256 is not None:
        source = {**meta.source, "name": jsonl.name, "mtime_ns": jsonl.stat().st_mtime_ns}
        if source != meta.source:  # the next start need not hash the file
            meta.source = source
            with suppress(OSError):  # the store is good, but may be on a read-only mount
                write_meta(store_path, meta)
        return True
    if meta.source is None or meta.tokenizer_sha256 is not None:  # not made from a jsonl
        raise InputError(
            f"{store_path}: found other codes than in {jsonl} now; train on the store, or delete or rename it"
        )
    return False


def jsonl_to_store(
    jsonl: Path,
    store_path: Path,
    sizes: Sizes,
    processes: int,
    max_bad_fraction: float = 0.0,
    crops_per_image: int = 1,
    class_names: list[str] | None = None,
) -> BadLines:
    """Check all lines and write them to a token store, atomically; chunk files, as large as the store, are in
    `<store>.lines/` meanwhile. Returns the bad lines that were left out.

    Args:
        max_bad_fraction: bad lines up to this share of all are left out.
        crops_per_image: consecutive lines that belong to one image.
        class_names: in the order of the class ids.

    Raises:
        InputError: more bad lines than allowed, of which it names the first ten, or a last image without all its
            crops. Nothing is kept.
    """
    check_codebook_size(store_path, sizes.codebook_size)
    status = jsonl.stat()
    chunk_files = ChunkFiles(
        store_path.with_name(store_path.name + ".lines"),
        num_items=status.st_size,
        chunk_size=CHUNK_BYTES,
        suffix=".npz",
    )
    bad_lines = BadLines(max_bad_fraction)
    if not chunk_files.chunks:
        bad_lines.check(jsonl, complete=True)
    file = {"name": jsonl.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    chunk_files.open_or_replace({**file, **sizes._asdict(), "chunk bytes": CHUNK_BYTES})
    try:
        chunk_hashes = _convert_lines(jsonl, chunk_files, sizes, bad_lines, processes)
        if bad_lines.num_lines % crops_per_image:
            raise InputError(
                f"{jsonl}: found {bad_lines.num_lines} lines, expected a multiple of {crops_per_image}, the crops of "
                "each image"
            )
    except InputError:
        chunk_files.remove()
        raise
    meta = StoreMeta(
        image_seq_len=sizes.image_seq_len,
        codebook_size=sizes.codebook_size,
        crops_per_image=crops_per_image,
        class_names=class_names,
        source=describe_source(jsonl, chunk_hashes),
        num_skipped=bad_lines.count,
        grid_size=edge_of_square(sizes.image_seq_len),
    )
    fault_point("join.begin", 0)
    with new_token_store(store_path, meta) as writer:
        for chunk in tqdm(chunk_files.chunks, desc=store_path.name, unit="chunk", delay=2):
            with np.load(chunk_files.path(chunk)) as content:
                writer.append(content["codes"], content["class_ids"])
        fault_point("join.end", 0)
    chunk_files.remove()
    return bad_lines


def edge_of_square(image_seq_len: int) -> int | None:
    """The edge of the square grid of this many tokens; None: no square."""
    edge = isqrt(image_seq_len)
    return edge if edge**2 == image_seq_len else None


def _convert_lines(
    jsonl: Path, chunk_files: ChunkFiles, sizes: Sizes, bad_lines: BadLines, processes: int
) -> list[str]:
    """Write the missing chunks and return the hash of each chunk of bytes. Bad lines are counted in file order, as far
    as the file has been read without a gap."""

    def convert(chunk: range) -> None:
        lines = read_range(jsonl, chunk.start, chunk.stop, sizes)
        with chunk_files.writing(chunk) as partial, partial.open("wb") as file:
            digest = range_sha256(jsonl, chunk.start, chunk.stop)
            counts = json.dumps([lines.num_lines, lines.num_bad, lines.reasons, digest])
            np.savez(file, codes=lines.codes, class_ids=lines.class_ids, counts=counts)

    missing = chunk_files.missing()
    pending = {chunk.start for chunk in missing}
    hashes: list[str] = []

    def count_ready_chunks() -> None:
        while len(hashes) < len(chunk_files.chunks) and chunk_files.chunks[len(hashes)].start not in pending:
            with np.load(chunk_files.path(chunk_files.chunks[len(hashes)])) as content:
                num_lines, num_bad, reasons, digest = json.loads(str(content["counts"]))
            bad_lines.add(num_lines, num_bad, reasons)
            hashes.append(digest)
        bad_lines.check(jsonl, complete=len(hashes) == len(chunk_files.chunks))

    count_ready_chunks()
    size = chunk_files.chunks[-1].stop
    with (
        tqdm(total=size, initial=size - sum(map(len, missing)), desc=jsonl.name, unit="B", unit_scale=True) as progress,
        closing(in_processes(convert, missing, processes)) as finished,
    ):
        for chunk in finished:
            pending.remove(chunk.start)
            progress.update(len(chunk))
            count_ready_chunks()
    return hashes


def store_to_jsonl(store_path: Path, jsonl: Path, processes: int) -> int:
    """Write the samples as jsonl, atomically, unless it is complete; rows are in `<jsonl>.rows/` meanwhile. The
    store's meta.json then records the jsonl as its source. Returns the number of samples.

    Raises InputError for a missing or damaged store, or a different file at `jsonl`.
    """
    meta, codes, class_ids = open_store(store_path)
    chunk_files = ChunkFiles(
        jsonl.with_name(jsonl.name + ".rows"), num_items=len(codes), chunk_size=CHUNK_ROWS, suffix=".done"
    )
    sizes = [
        formatted_size(class_ids[chunk.start : chunk.stop], codes[chunk.start : chunk.stop])
        for chunk in chunk_files.chunks
    ]
    growing = chunk_files.folder / "growing.jsonl"
    if jsonl.exists():
        was_published = chunk_files.folder.exists() and not growing.exists()  # by a run that was killed right after
        if jsonl.stat().st_size != sum(sizes) or not (was_published or is_source(meta.source, jsonl)):
            raise InputError(f"{jsonl}: exists and is not {store_path} as jsonl; delete it or choose another name")
    else:
        chunk_files.open_or_replace({"codes": meta.fingerprint, "chunk rows": CHUNK_ROWS})
        growing.open("ab").close()
        _write_rows(growing, codes, class_ids, chunk_files, sizes, processes)
        fault_point("join.begin", 0)
        publish(growing, jsonl)
        fault_point("join.end", 0)
    if jsonl.with_suffix(".tokens") == store_path:
        meta.source = describe_source(jsonl)
        write_meta(store_path, meta)
    chunk_files.remove()
    return len(codes)


def _write_rows(
    growing: Path, codes: np.ndarray, class_ids: np.ndarray, chunk_files: ChunkFiles, sizes: list[int], processes: int
) -> None:
    """Write the missing chunks at their offsets in the growing jsonl; `sizes`: bytes of each chunk."""
    offsets = dict(zip(chunk_files.chunks, accumulate(sizes, initial=0), strict=False))

    def convert(chunk: range) -> None:
        text = format_lines(class_ids[chunk.start : chunk.stop], codes[chunk.start : chunk.stop])
        with chunk_files.writing(chunk) as marker:
            with errors_name(growing), growing.open("r+b") as file:
                file.seek(offsets[chunk])
                file.write(text)
            sync(growing)
            marker.touch()

    missing = chunk_files.missing()
    with (
        tqdm(
            total=len(codes),
            initial=len(codes) - sum(map(len, missing)),
            desc=chunk_files.folder.stem,
            unit="line",
            unit_scale=True,
            delay=2,
        ) as progress,
        closing(in_processes(convert, missing, processes)) as finished,
    ):
        for chunk in finished:
            progress.update(len(chunk))
