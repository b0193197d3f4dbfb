"""Encode images once, so that training reads codes instead of images.

    torchrun --nproc_per_node=8 scripts/pretokenize.py config=configs/rear_b.yaml \\
        dataset.params.train_shards_path_or_url="imagenet-train-{000000..000252}.tar" \\
        dataset.params.pretokenization=maskgitvq.jsonl

Reads the images of `dataset.params.train_shards_path_or_url` in their order, cuts each into the crops of
`dataset.preprocessing.pretokenize_crops` and encodes them with `experiment.tokenizer_checkpoint`, on GPUs if there
are any: `training.per_gpu_batch_size` crops at a time, read by `dataset.params.num_workers_per_gpu` processes per GPU.
The output does not depend on the number of processes.

Writes `dataset.params.pretokenization` atomically: a .tokens store or, if the name ends in .jsonl, that file and a
store of the same name. Samples are in the order of the images, the crops of an image together. Finished chunks of
images are in `<name>.tokens.chunks/` meanwhile; rerun the same command to resume a killed run.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import load_config_or_exit
from utils.schema import Config

READS = {
    "experiment": "tokenizer_checkpoint",
    "model.vq_model": "all",
    "model.generator": "condition_num_classes",
    "dataset.params": "pretokenization train_shards_path_or_url num_workers_per_gpu on_bad_sample max_bad_fraction",
    "dataset.preprocessing": "all but random_crop random_flip",
    "training": "per_gpu_batch_size enable_tf32 seed",
}

if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(Config, __doc__, READS)

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.codes.conversion import store_to_jsonl
from data.codes.store_files import StoreMeta
from data.codes.token_store import TokenStore
from data.codes.token_writer import new_token_store
from data.images.image_io import ImageDecoding
from data.images.image_source import ImageSource
from data.images.notices import check_unreadable
from data.images.reading import ImageDataset, allowed_bad_fraction, open_images
from data.images.shard_cache import DOWNLOADS, ShardCache
from data.images.shard_urls import describe_url, expand_urls, is_url, without_query
from data.images.tar_shards import ShardSamples, TarShards
from data.images.transforms import crop_settings, cut_crops, pretokenize_transform
from data.loading import Batches
from modeling.loading import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, input_errors_exit
from utils.faults import fault_point
from utils.files.chunk_files import ChunkFiles
from utils.files.hashing import hash_of
from utils.files.json_file import read_json
from utils.files.lock import only_writer
from utils.files.provenance import differences
from utils.images import to_float
from utils.precision import matmul_precision
from utils.processes import num_cpus
from utils.token_ids import MAX_CODEBOOK_SIZE, token_dtype

IMAGES_PER_CHUNK = 256  # rounded up to a multiple of the batch size


def main(config: Config) -> None:
    image_path, output = checked_paths(config)
    tokenizer = load_tokenizer(config)
    if not tokenizer.has_images:
        raise tokenizer.no_images(f"dataset.params.train_shards_path_or_url={image_path}")
    if is_url(image_path):
        with init_distributed() as ctx, ctx.locked(output.with_suffix(".tokens")):
            pretokenize(config, ShardsToEncode(image_path, config, tokenizer, output, ctx), output)
        return
    source = open_images(
        image_path, config.model.generator.condition_num_classes, ImageDecoding.of(config.dataset.preprocessing)
    )
    with init_distributed() as ctx, ctx.locked(output.with_suffix(".tokens")):
        pretokenize(config, ImagesToEncode(source, config, tokenizer, output, ctx), output)


def pretokenize(config: Config, work: "ImagesToEncode | ShardsToEncode", output: Path) -> None:
    """Encode what is missing, on all ranks; then rank 0 writes the store and, if asked for, the jsonl."""
    ctx, store_path = work.ctx, output.with_suffix(".tokens")
    for line in verdict_on(config.experiment.tokenizer_checkpoint):
        ctx.print_on_rank0(line)
    missing: list[range] = []
    if store_path.is_dir():
        check_finished(TokenStore(store_path), work.meta, ctx)
    else:
        missing = work.chunk_files.open_on_all_ranks(work.provenance, ctx)
    started = time.perf_counter()
    if missing:
        with matmul_precision(config.training.enable_tf32):
            work.encode(missing)
    if not ctx.is_rank0:
        return
    if not store_path.is_dir():
        work.chunk_files.wait()
        seconds = time.perf_counter() - started
        source = work.finished_source()
        count = work.count_images(missing, source)
        print(f"{count} images encoded, {count / seconds:.1f} images/s on {ctx.size} x {ctx.device.type}")
        join(work, store_path, source, allowed_bad_fraction(config.dataset.params))
    store = TokenStore(store_path)
    if output.suffix == ".jsonl":
        with only_writer(output):
            store_to_jsonl(store_path, output, num_cpus())
    work.chunk_files.remove()
    left_out = f", {store.meta.num_skipped} left out" if store.meta.num_skipped else ""
    num_images = len(store) // store.meta.crops_per_image + store.meta.num_skipped
    print(f"{output}: {num_images} images{left_out}, {len(store)} samples")


def verdict_on(tokenizer_checkpoint: str) -> list[str]:
    """What train_tokenizer.py has written about a tokenizer that it trained."""
    path = Path(tokenizer_checkpoint).with_name("metrics.json")
    metrics = read_json(path) if path.is_file() else None
    return metrics.get("verdict", []) if isinstance(metrics, dict) else []  # not another program's file of this name


def checked_paths(config: Config) -> tuple[str, Path]:
    """The images to read, and the file or store to write; raises InputError for a missing or wrong key."""
    images, codes = config.dataset.params.train_shards_path_or_url, config.dataset.params.pretokenization
    if images is None or codes is None:
        key = "train_shards_path_or_url" if images is None else "pretokenization"
        raise InputError(f"dataset.params.{key}: missing; give the images to read and the codes to write")
    output = Path(codes)
    if output.suffix not in (".jsonl", ".tokens"):
        raise InputError(f"dataset.params.pretokenization={output}: expected a name that ends in .jsonl or .tokens")
    if output.exists() and not output.with_suffix(".tokens").exists():
        raise InputError(f"{output}: exists without the store of a pre-tokenization; choose another name")
    if config.model.vq_model.codebook_size > MAX_CODEBOOK_SIZE:
        raise InputError(
            f"model.vq_model.codebook_size={config.model.vq_model.codebook_size}: expected at most {MAX_CODEBOOK_SIZE}"
        )
    return images, output


class _ToEncode:
    """What images in files and shards at URLs have in common.

    Attributes:
        meta: of the store: everything that the codes depend on.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, output: Path, ctx: DistributedContext) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.ctx = ctx
        self.store_path = output.with_suffix(".tokens")
        self.chunk_folder = self.store_path.with_name(self.store_path.name + ".chunks")
        self.preprocessing = config.dataset.preprocessing
        self.crops = cut_crops(torch.empty(1, 1, 1, 3), self.preprocessing).shape[1]
        self.batch_size = max(1, config.training.per_gpu_batch_size // self.crops)
        settings: dict[str, Any] = crop_settings(self.preprocessing)
        settings["training.per_gpu_batch_size"] = config.training.per_gpu_batch_size
        settings["training.enable_tf32"] = config.training.enable_tf32 and ctx.device.type == "cuda"
        settings["device"] = ctx.device.type
        self.meta = StoreMeta(
            image_seq_len=tokenizer.image_seq_len,
            codebook_size=tokenizer.codebook_size,
            crops_per_image=self.crops,
            grid_size=tokenizer.code_shape[0] if len(tokenizer.code_shape) == 2 else None,
            tokenizer_sha256=tokenizer.sha256(),
            settings=settings,
        )

    def data_set(self, source: ImageSource, max_bad_fraction: float) -> ImageDataset:
        return ImageDataset(
            source, pretokenize_transform(self.preprocessing), self.config.training.seed, max_bad_fraction
        )

    def rows(self, images: ImageDataset, items: list[list[int]]) -> Iterator[np.ndarray]:
        """Of each batch of image numbers, rows (b * K, N + 1) of `token_dtype`: each crop's codes, and 1 if its image
        is to be left out. Workers that read start at once, not with the first batch."""
        workers = self.config.dataset.params.num_workers_per_gpu
        batches = Batches(images, items, workers, self.ctx.device.type == "cuda")
        tokenizer, dtype = self.tokenizer.to(self.ctx.device), token_dtype(self.tokenizer.codebook_size)

        @torch.inference_mode()
        def encode(batch: dict[str, torch.Tensor]) -> np.ndarray:
            images.skipped.add(batch["index"], batch["skipped"])
            crops = cut_crops(batch["image"].to(self.ctx.device), self.preprocessing)  # (b, K, H, W, 3)
            is_bad = batch["skipped"].repeat_interleave(crops.shape[1])[:, None]
            codes = tokenizer.encode(to_float(crops.flatten(0, 1))).cpu()  # (b * K, N)
            return torch.cat([codes, is_bad], dim=1).numpy().astype(dtype)

        return map(encode, batches)

    def batches_of(self, indices: range) -> list[list[int]]:
        return [list(indices[i : i + self.batch_size]) for i in range(0, len(indices), self.batch_size)]


class ImagesToEncode(_ToEncode):
    """Images in local files: chunks of consecutive images, dealt out to the ranks."""

    def __init__(
        self, source: ImageSource, config: Config, tokenizer: Tokenizer, output: Path, ctx: DistributedContext
    ) -> None:
        super().__init__(config, tokenizer, output, ctx)
        self.images = self.data_set(source, allowed_bad_fraction(config.dataset.params))
        # No batch spans two chunks or shards: kernels may round differently for another batch size.
        chunk_size = -(-IMAGES_PER_CHUNK // self.batch_size) * self.batch_size
        self.chunk_files = ChunkFiles(
            self.chunk_folder, num_items=len(source), chunk_size=chunk_size, suffix=".npy", parts=source.parts
        )
        describe_source(self.meta, source)
        recorded = self.chunk_files.recorded("source_files")
        if self.store_path.is_dir():
            recorded = TokenStore(self.store_path).meta.source_files
        self.meta.source_files = ctx.broadcast_from_rank0(lambda: files_fingerprint(source, recorded))
        self.provenance = {**provenance_of(self.meta), "images per chunk": chunk_size}

    def encode(self, missing: list[range]) -> None:
        """Write the missing chunks of this rank. Rank 0 shows the progress of all ranks."""
        mine = missing[self.ctx.rank :: self.ctx.size]
        rows = self.rows(self.images, [batch for chunk in mine for batch in self.batches_of(chunk)])
        num_images = len(self.images)

        def num_finished() -> int:
            return num_images - sum(map(len, self.chunk_files.missing()))

        with tqdm(
            total=num_images, initial=num_finished(), unit="image", smoothing=0, disable=not self.ctx.is_rank0
        ) as progress:
            for chunk in mine:
                codes = np.concatenate([next(rows) for _ in self.batches_of(chunk)])
                with self.chunk_files.writing(chunk) as partial, partial.open("wb") as file:
                    np.save(file, codes)
                if self.ctx.is_rank0:
                    progress.update(num_finished() - progress.n)

    def finished_source(self) -> ImageSource:
        return self.images.source

    def count_images(self, missing: list[range], source: ImageSource) -> int:
        return sum(map(len, missing))


class ShardsToEncode(_ToEncode):
    """Shards at URLs: a chunk is a shard, which one rank downloads, encodes and deletes. Meanwhile it downloads its
    next one."""

    def __init__(
        self, pattern: str, config: Config, tokenizer: Tokenizer, output: Path, ctx: DistributedContext
    ) -> None:
        super().__init__(config, tokenizer, output, ctx)
        self.urls, self.meta.source_files = ctx.broadcast_from_rank0(describe_urls, pattern)
        self.chunk_files = ChunkFiles(self.chunk_folder, num_items=len(self.urls), chunk_size=1, suffix=".npy")
        self.copies = ShardCache(self.chunk_folder / "shards", max_bytes=math.inf)
        self.provenance = provenance_of(self.meta)

    def encode(self, missing: list[range]) -> None:
        """Write the missing chunks of this rank. Rank 0 shows the progress of all ranks."""
        self.ctx.rank0_first(self._copy_companions)
        mine = [chunk.start for chunk in missing[self.ctx.rank :: self.ctx.size]]
        total = len(self.urls)
        # The bad images of a single shard may be more than those of all: `join` counts them.
        any_fraction = 1.0 if allowed_bad_fraction(self.config.dataset.params) else 0.0

        def num_finished() -> int:
            return total - len(self.chunk_files.missing())

        with (
            tqdm(
                total=total, initial=num_finished(), unit="shard", smoothing=0, disable=not self.ctx.is_rank0
            ) as progress,
            ThreadPoolExecutor(1) as downloads,
        ):
            copies = [downloads.submit(self.copies.fetch_one, self.urls[number]) for number in mine[:1]]
            for position, number in enumerate(mine):
                path = copies[position].result()
                source = TarShards(self.urls[number], copies=[path])
                source.decoding = ImageDecoding.of(self.preprocessing)
                source.check_class_ids(self.config.model.generator.condition_num_classes)
                images = self.data_set(source, any_fraction)
                rows = self.rows(images, self.batches_of(range(len(source))))
                # Only now: data workers are forked while no other thread runs.
                following = [self.urls[later] for later in mine[position + 1 : position + 2]]
                copies += [downloads.submit(self.copies.fetch_one, url) for url in following]
                codes = np.concatenate(list(rows))
                with self.chunk_files.writing(range(number, number + 1)) as partial, partial.open("wb") as file:
                    np.save(file, codes)
                path.unlink()
                if self.ctx.is_rank0:
                    progress.update(num_finished() - progress.n)

    def _copy_companions(self) -> None:
        if self.ctx.is_rank0:
            self.copies.copy_companions(self.urls)

    def finished_source(self) -> ShardSamples:
        """The samples of all shards, as far as the store needs them."""
        source = self.copies.samples_of(self.urls)
        source.check_class_ids(self.config.model.generator.condition_num_classes)
        describe_source(self.meta, source)
        return source

    def count_images(self, missing: list[range], source: ImageSource) -> int:
        return sum(source.parts[chunk.start] for chunk in missing)


def describe_urls(pattern: str) -> tuple[list[str], str]:
    """The URLs of a pattern, and a hash of what the servers say about them."""
    urls = expand_urls(pattern)
    with ThreadPoolExecutor(DOWNLOADS) as threads:
        files = list(threads.map(describe_url, urls))
    facts = [(without_query(url), file.size, file.version) for url, file in zip(urls, files, strict=True)]
    return urls, hash_of({"urls": facts})


def describe_source(meta: StoreMeta, source: ImageSource) -> None:
    """Record the images in the meta of their store."""
    meta.class_names = source.class_names
    meta.source_sha256 = source.fingerprint
    meta.shard_samples = source.parts if isinstance(source, ShardSamples) else None


def files_fingerprint(source: ImageSource, recorded: str | None) -> str:
    """`ImageSource.files_fingerprint`, or the recorded one if the files state their content, since copies have other
    modification times."""
    found = source.files_fingerprint
    return recorded if recorded not in (None, found) and source.has_stated_content() else found


def provenance_of(meta: StoreMeta) -> dict[str, Any]:
    keys = ("image_seq_len", "codebook_size", "tokenizer_sha256", "source_sha256", "source_files", "class_names")
    return {**{key: getattr(meta, key) for key in keys}, **(meta.settings or {})}


def check_finished(store: TokenStore, meta: StoreMeta, ctx: DistributedContext) -> None:
    """Raise InputError if the existing store is not the one that this command would write."""
    expected = meta
    if store.meta.source_files is None:  # of an earlier version
        ctx.print_on_rank0(f"{store.path}: records no sizes and times of its images; only their names are compared")
        expected = replace(meta, source_files=None)
    if meta.source_sha256 is None:  # of URLs, which are not read again
        expected = replace(meta, source_sha256=store.meta.source_sha256, class_names=store.meta.class_names)
    different = differences(found=provenance_of(store.meta), expected=provenance_of(expected))
    if different:
        raise InputError(
            f"{store.path}: exists with another provenance: {different[0]}; delete it or write to another "
            "dataset.params.pretokenization"
        )


def join(work: ImagesToEncode | ShardsToEncode, store_path: Path, source: ImageSource, max_bad_fraction: float) -> None:
    """Write the store from all chunks, one at a time, without the images that could not be read; raises InputError if
    too many are unreadable."""
    fault_point("join.begin", 0)
    bad: set[int] = set()
    crops, start = work.crops, 0
    with new_token_store(store_path, work.meta) as writer:
        for chunk in tqdm(work.chunk_files.chunks, desc=store_path.name, unit="chunk", delay=2):
            rows = np.load(work.chunk_files.path(chunk))
            stop = start + len(rows) // crops
            labels = source.class_ids[start:stop].repeat(crops)
            is_bad = rows[:, -1] > 0
            writer.append(rows[~is_bad, :-1], labels[~is_bad])
            bad |= {start + row // crops for row in np.flatnonzero(is_bad).tolist()}
            start = stop
        check_unreadable(source, bad, max_bad_fraction)
        writer.meta.num_skipped = len(bad)
        fault_point("join.end", 0)


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
