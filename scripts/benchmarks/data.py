"""Reading tokens for training: the token store compared with linecache and json, on a generated jsonl.

Each measurement runs in a fresh process; memory is counted from after its imports.
"""

import argparse
import json
import linecache
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.batch_sampler import GlobalBatchSampler
from data.codes.conversion import jsonl_to_store
from data.codes.jsonl import Sizes, format_lines
from data.codes.token_store import TokenStore
from utils.arguments import positive
from utils.errors import InputError
from utils.files.text import user_path

CODEBOOK_SIZE, NUM_CLASSES = 1024, 1000
DISTINCT_LINES = 20_000  # of a generated file; further lines repeat them in a different order
COMPARED_ITEMS = 1000
PUBLISHED_OVERHEAD = 60  # bytes per line, without its text: a str object and its entry in a list
MEMORY_SHARE = 0.6  # of the free memory that the published method may use

Figures = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lines", type=positive, nargs="+", default=[100_000, 1_000_000], help="of generated files")
    parser.add_argument("--tokens", type=positive, default=256, help="codes per line")
    parser.add_argument("--batch", type=positive, default=256, help="items per batch")
    parser.add_argument("--batches", type=positive, default=50, help="batches that are timed")
    parser.add_argument("--ranks", type=positive, default=4, help="training processes at a time, on the store")
    parser.add_argument("--folder", type=user_path, help="for files of 2.4 times the largest jsonl; default: temporary")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of the largest file; for the published method, of the largest file that fits in memory."""
    settings: list[dict[str, Any]] = []
    published: dict[str, Any] = {}
    for lines in arguments.lines:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            figures = measure(Path(folder), lines, arguments)
        settings.append({"lines": lines, **figures})
        published |= {key: value for key, value in figures.items() if key.endswith("_published")}
        print(f"{lines} lines: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    return {**settings[-1], **published, "ranks": arguments.ranks, "settings": settings}


def measure(folder: Path, lines: int, arguments: argparse.Namespace) -> Figures:
    """Figures of both methods on a generated file of this many lines, after a check that their items are equal."""
    jsonl, store = folder / "codes.jsonl", folder / "codes.tokens"
    sizes = Sizes(CODEBOOK_SIZE, arguments.tokens, NUM_CLASSES)
    generate(jsonl, lines, sizes)
    figures = in_fresh_processes(1, convert, jsonl, store, sizes, lines)[0]
    compare_items(jsonl, store, lines)
    ranks = in_fresh_processes(arguments.ranks, read_batches, open_store, store, arguments.batch, arguments.batches)
    figures |= {key: statistics.median(rank[key] for rank in ranks) for key in ranks[0]}
    if jsonl.stat().st_size + PUBLISHED_OVERHEAD * lines < MEMORY_SHARE * free_memory():
        found = in_fresh_processes(1, read_batches, open_published, jsonl, arguments.batch, arguments.batches)[0]
        figures |= {f"{key}_published": value for key, value in found.items()} | {"lines_published": lines}
    else:
        print(f"{lines} lines: the published method would need more than {MEMORY_SHARE:.0%} of the free memory")
    return figures


def generate(jsonl: Path, lines: int, sizes: Sizes) -> None:
    rng = np.random.default_rng(0)
    count = min(lines, DISTINCT_LINES)
    codes = rng.integers(0, sizes.codebook_size, (count, sizes.image_seq_len))
    distinct = format_lines(rng.integers(0, sizes.num_classes, count), codes).splitlines(keepends=True)
    with jsonl.open("wb") as file:
        for first in range(0, lines, count):
            cut = first // count % count
            file.writelines([*distinct[cut:], *distinct[:cut]][: lines - first])


def compare_items(jsonl: Path, store_path: Path, lines: int) -> None:
    """Raise InputError if an item of the store differs from its line."""
    compared = set(np.random.default_rng(1).integers(0, lines, COMPARED_ITEMS).tolist())
    store = TokenStore(store_path)
    with jsonl.open("rb") as file:
        for index, line in enumerate(file):
            if index in compared:
                record, item = json.loads(line), store[index]
                if (record["class_id"], record["tokens"]) != (item["class_labels"].item(), item["codes"].tolist()):
                    raise InputError(f"{store_path}: item {index} differs from its line, expected the same")


def in_fresh_processes(count: int, function: Callable[..., Figures], *arguments: Any) -> list[Figures]:
    """Results of a function in new processes, all at the same time."""
    with multiprocessing.get_context("spawn").Pool(count, maxtasksperchild=1) as pool:
        return pool.starmap(function, [arguments] * count, chunksize=1)


def convert(jsonl: Path, store: Path, sizes: Sizes, lines: int) -> Figures:
    """Lines per second and peak memory of a conversion in one process."""
    before, start = kilobytes("self/status", "VmRSS"), time.perf_counter()
    jsonl_to_store(jsonl, store, sizes, processes=1)
    return {
        "convert_lines_per_s": lines / (time.perf_counter() - start),
        "convert_extra_rss_mb": (kilobytes("self/status", "VmHWM") - before) * 1024 / 1e6,
    }


def open_store(path: Path, batch_size: int, num_batches: int) -> Iterator[Any]:
    store = TokenStore(path)
    sampler = GlobalBatchSampler(len(store), batch_size, 1, 0, 1, seed=0, first_step=0, last_step=num_batches)
    return iter(DataLoader(store, batch_sampler=sampler, collate_fn=store.collate))


class PublishedDataset(Dataset):
    """Lines of the jsonl by index, through linecache, which holds the whole file."""

    def __init__(self, jsonl: Path) -> None:
        self.jsonl = str(jsonl)
        with jsonl.open("rb") as file:
            self.num_lines = sum(1 for _ in file)

    def __len__(self) -> int:
        return self.num_lines

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        record = json.loads(linecache.getline(self.jsonl, index + 1))
        return torch.tensor(record["tokens"]), record["class_id"]


def open_published(path: Path, batch_size: int, num_batches: int) -> Iterator[Any]:
    return iter(DataLoader(PublishedDataset(path), batch_size=batch_size, shuffle=True))


def read_batches(open_data: Callable[..., Iterator[Any]], path: Path, batch_size: int, num_batches: int) -> Figures:
    """Seconds until the first batch, private memory after the last one, items per second between them."""
    memory, start = private_mb(), time.perf_counter()
    batches = open_data(path, batch_size, num_batches)
    next(batches)
    first = time.perf_counter()
    read = sum(1 for _, _ in zip(range(num_batches - 1), batches, strict=False))
    rate = read * batch_size / (time.perf_counter() - first)
    return {"start_s": first - start, "private_rss_mb": private_mb() - memory, "items_per_s": rate}


def private_mb() -> float:
    """Memory of this process that is not shared."""
    return kilobytes("self/smaps_rollup", "Private_") * 1024 / 1e6


def free_memory() -> int:
    """Free memory in bytes."""
    return kilobytes("meminfo", "MemAvailable") * 1024


def kilobytes(file: str, prefix: str) -> int:
    """Sum of the fields of a file in /proc whose names start with `prefix`."""
    lines = Path("/proc", file).read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(prefix))
