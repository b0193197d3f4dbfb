"""Codes for training: the token store against linecache and json on the published jsonl, a generated file.

Each probe is a fresh process; what it has in memory after its imports does not count.
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
from utils.errors import InputError

CODEBOOK_SIZE, NUM_CLASSES = 1024, 1000
DISTINCT_LINES = 20_000  # then they come again, in another order
COMPARED_ITEMS = 1000
PARSED_LINES = 20_000  # by json alone
PUBLISHED_OVERHEAD = 60  # bytes per line beside its text: a str object and its place in a list
MEMORY_SHARE = 0.6  # of the free memory that the published way may take

Figures = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lines", type=int, nargs="+", default=[100_000, 1_000_000], help="of the generated files")
    parser.add_argument("--tokens", type=int, default=256, help="codes per line")
    parser.add_argument("--batch", type=int, default=256, help="items per batch")
    parser.add_argument("--batches", type=int, default=50, help="batches that are timed")
    parser.add_argument("--ranks", type=int, default=4, help="training processes at a time, on the store")
    parser.add_argument("--folder", type=Path, help="for the files, 2.4 times the largest jsonl; default: temporary")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures by size; those of the largest are the result, of the published way the largest that fits in memory."""
    settings: list[dict[str, Any]] = []
    published: dict[str, Any] = {}
    for lines in arguments.lines:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            figures = measure(Path(name), lines, arguments)
        settings.append({"lines": lines, **figures})
        published |= {key: value for key, value in settings[-1].items() if key.endswith("_published")}
        print(f"{lines} lines: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
    return {**settings[-1], **published, "ranks": arguments.ranks, "settings": settings}


def measure(folder: Path, lines: int, arguments: argparse.Namespace) -> Figures:
    """Both ways on a generated file of so many lines; checks that their items are equal."""
    jsonl, store = folder / "codes.jsonl", folder / "codes.tokens"
    sizes = Sizes(CODEBOOK_SIZE, arguments.tokens, NUM_CLASSES)
    generate(jsonl, lines, sizes)
    figures = fresh_processes(1, convert, jsonl, store, sizes, lines)[0]
    figures |= fresh_processes(1, parse_with_json, jsonl)[0]
    compare_items(jsonl, store, lines)
    workload = (arguments.batch, arguments.batches)
    ranks = fresh_processes(arguments.ranks, read_batches, open_store, store, *workload)
    figures |= {key: statistics.median(rank[key] for rank in ranks) for key in ranks[0]}
    if jsonl.stat().st_size + PUBLISHED_OVERHEAD * lines < MEMORY_SHARE * free_memory():
        found = fresh_processes(1, read_batches, open_published, jsonl, *workload)[0]
        figures |= {f"{key}_published": value for key, value in found.items()} | {"lines_published": lines}
    else:
        print(f"{lines} lines: the published way would need more than {MEMORY_SHARE:.0%} of the free memory")
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
    """
    Raises:
        InputError: an item of the store differs from its line.
    """
    wanted = set(np.random.default_rng(1).integers(0, lines, COMPARED_ITEMS).tolist())
    store = TokenStore(store_path)
    with jsonl.open("rb") as file:
        for index, line in enumerate(file):
            if index in wanted:
                record, item = json.loads(line), store[index]
                if (record["class_id"], record["tokens"]) != (item["class_labels"].item(), item["codes"].tolist()):
                    raise InputError(f"gate: item {index} differs from its line, expected the same")


def fresh_processes(count: int, function: Callable[..., Figures], *arguments: Any) -> list[Figures]:
    """Results of a function in new processes, all at the same time."""
    context = multiprocessing.get_context("spawn")
    pools = [context.Pool(1) for _ in range(count)]
    results = [pool.apply_async(function, arguments) for pool in pools]
    try:
        return [result.get() for result in results]
    finally:
        for pool in pools:
            pool.terminate()


def convert(jsonl: Path, store: Path, sizes: Sizes, lines: int) -> Figures:
    """In one process: lines per second of wall and of CPU time, and the peak of memory."""
    before, wall, cpu = kilobytes("self/status", "VmRSS"), time.perf_counter(), time.process_time()
    jsonl_to_store(jsonl, store, sizes, processes=1)
    figures = {"convert_lines_per_s": lines / (time.perf_counter() - wall)}
    figures["convert_lines_per_cpu_s"] = lines / (time.process_time() - cpu)
    # This process has imported torch, 500 MB of it, which conversion alone does not need.
    figures["convert_extra_rss_mb"] = (kilobytes("self/status", "VmHWM") - before) * 1024 / 1e6
    return figures


def parse_with_json(jsonl: Path) -> Figures:
    """What the published way does with a line, as often as it meets it."""
    with jsonl.open() as file:
        texts = [line for _, line in zip(range(PARSED_LINES), file, strict=False)]
    started = time.perf_counter()
    for text in texts:
        torch.tensor(json.loads(text)["tokens"])
    return {"convert_lines_per_s_published": len(texts) / (time.perf_counter() - started)}


def open_store(path: Path, batch_size: int, num_batches: int) -> Iterator[Any]:
    store = TokenStore(path)
    sampler = GlobalBatchSampler(len(store), batch_size, 1, 0, 1, seed=0, first_step=0, last_step=num_batches)
    return iter(DataLoader(store, batch_sampler=sampler, collate_fn=store.collate))


class PublishedDataset(Dataset):
    """A line of the jsonl by its number, through linecache, which holds the whole file."""

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
    """Seconds until the first batch, private memory after the last one, items per second between."""
    memory, started = private_mb(), time.perf_counter()
    batches = open_data(path, batch_size, num_batches)
    next(batches)
    first = time.perf_counter()
    read = sum(1 for _, _ in zip(range(num_batches - 1), batches, strict=False))
    seconds = time.perf_counter() - first
    rate = read * batch_size / seconds
    return {"start_s": first - started, "private_rss_mb": private_mb() - memory, "items_per_s": rate}


def private_mb() -> float:
    """Memory of this process that it shares with no other."""
    return kilobytes("self/smaps_rollup", "Private_") * 1024 / 1e6


def free_memory() -> int:
    """Bytes."""
    return kilobytes("meminfo", "MemAvailable") * 1024


def kilobytes(file: str, prefix: str) -> int:
    """Sum of the fields of a file in /proc whose name begins so."""
    lines = Path("/proc", file).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(prefix))
