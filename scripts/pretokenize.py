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

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.codes.conversion import store_to_jsonl
from data.codes.store_files import MAX_CODEBOOK_SIZE, StoreMeta
from data.codes.token_store import TokenStore
from data.codes.token_writer import new_token_store
from data.images.image_io import ImageDecoding
from data.images.image_source import ImageSource
from data.images.notices import check_unreadable
from data.images.reading import ImageDataset, allowed_bad_fraction, open_images
from data.images.transforms import crop_settings, cut_crops, pretokenize_transform
from data.loading import Batches
from modeling.loading import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, input_errors_exit
from utils.faults import fault_point
from utils.files.chunk_files import ChunkFiles
from utils.files.json_file import read_json
from utils.files.lock import only_writer
from utils.files.provenance import differences
from utils.images import to_float
from utils.precision import matmul_precision
from utils.processes import num_cpus
from utils.schema import DatasetConfig

IMAGES_PER_CHUNK = 256  # rounded up to a multiple of the batch size


def main(config: Config) -> None:
    image_path, output = checked_paths(config)
    tokenizer = load_tokenizer(config)
    if not tokenizer.has_images:
        raise tokenizer.no_images(f"dataset.params.train_shards_path_or_url={image_path}")
    source = open_images(
        image_path, config.model.generator.condition_num_classes, ImageDecoding.of(config.dataset.preprocessing)
    )
    with init_distributed() as ctx, ctx.locked(output.with_suffix(".tokens")):
        for line in verdict_on(config.experiment.tokenizer_checkpoint):
            ctx.print_on_rank0(line)
        pretokenize(config, source, tokenizer, output, ctx)


def pretokenize(
    config: Config, source: ImageSource, tokenizer: Tokenizer, output: Path, ctx: DistributedContext
) -> None:
    store_path = output.with_suffix(".tokens")
    preprocessing = config.dataset.preprocessing
    max_bad_fraction = allowed_bad_fraction(config.dataset.params)
    images = ImageDataset(source, pretokenize_transform(preprocessing), config.training.seed, max_bad_fraction)
    crops = cut_crops(images[0]["image"][None], preprocessing).shape[1]
    batch_size = max(1, config.training.per_gpu_batch_size // crops)
    # A batch never spans two chunks: kernels may round differently for another batch size.
    chunk_size = -(-IMAGES_PER_CHUNK // batch_size) * batch_size
    chunk_folder = store_path.with_name(store_path.name + ".chunks")
    chunk_files = ChunkFiles(chunk_folder, num_items=len(images), chunk_size=chunk_size, suffix=".npy")
    meta = describe(config, tokenizer, images, crops, ctx.device)
    recorded = TokenStore(store_path).meta.source_files if store_path.is_dir() else chunk_files.recorded("source_files")
    meta.source_files = ctx.broadcast_from_rank0(lambda: files_fingerprint(source, recorded))
    missing: list[range] = []
    if store_path.is_dir():
        check_finished(TokenStore(store_path), meta, ctx)
    else:
        missing = chunk_files.open_on_all_ranks({**provenance_of(meta), "images per chunk": chunk_size}, ctx)
    started = time.perf_counter()
    if missing:
        with matmul_precision(config.training.enable_tf32):
            encode(
                chunks=missing[ctx.rank :: ctx.size],
                chunk_files=chunk_files,
                images=images,
                tokenizer=tokenizer.to(ctx.device),
                batch_size=batch_size,
                dataset=config.dataset,
                ctx=ctx,
            )
    if not ctx.is_rank0:
        return
    if not store_path.is_dir():
        chunk_files.wait()
        rate = sum(map(len, missing)) / (time.perf_counter() - started)
        print(f"{sum(map(len, missing))} images encoded, {rate:.1f} images/s on {ctx.size} x {ctx.device.type}")
        join(chunk_files, store_path, meta, source, max_bad_fraction)
    store = TokenStore(store_path)
    if output.suffix == ".jsonl":
        with only_writer(output):
            store_to_jsonl(store_path, output, num_cpus())
    chunk_files.remove()
    left_out = f", {store.meta.num_skipped} left out" if store.meta.num_skipped else ""
    print(f"{output}: {len(images)} images{left_out}, {len(store)} samples")


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


def describe(config: Config, tokenizer: Tokenizer, images: ImageDataset, crops: int, device: torch.device) -> StoreMeta:
    """The meta of the store: everything that the codes depend on."""
    preprocessing = config.dataset.preprocessing
    settings: dict[str, Any] = crop_settings(preprocessing)
    settings["training.per_gpu_batch_size"] = config.training.per_gpu_batch_size
    settings["training.enable_tf32"] = config.training.enable_tf32 and device.type == "cuda"
    settings["device"] = device.type
    return StoreMeta(
        image_seq_len=tokenizer.image_seq_len,
        codebook_size=tokenizer.codebook_size,
        crops_per_image=crops,
        class_names=images.source.class_names,
        grid_size=tokenizer.code_shape[0] if len(tokenizer.code_shape) == 2 else None,
        tokenizer_sha256=tokenizer.sha256(),
        source_sha256=images.fingerprint,
        settings=settings,
    )


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
    different = differences(found=provenance_of(store.meta), expected=provenance_of(expected))
    if different:
        raise InputError(
            f"{store.path}: exists with another provenance: {different[0]}; delete it or write to another "
            "dataset.params.pretokenization"
        )


@torch.inference_mode()
def encode(
    chunks: list[range],
    chunk_files: ChunkFiles,
    images: ImageDataset,
    tokenizer: Tokenizer,
    batch_size: int,
    dataset: DatasetConfig,
    ctx: DistributedContext,
) -> None:
    """Write chunks of (n * K, N + 1) uint16: each crop's codes, and 1 if its image is to be left out. Rank 0 shows the
    progress of all ranks."""
    items = [list(chunk[i : i + batch_size]) for chunk in chunks for i in range(0, len(chunk), batch_size)]
    batches = Batches(images, items, dataset.params.num_workers_per_gpu, ctx.device.type == "cuda")
    num_finished = len(images) - sum(map(len, chunk_files.missing()))
    with tqdm(total=len(images), initial=num_finished, unit="image", smoothing=0, disable=not ctx.is_rank0) as progress:
        for chunk in chunks:
            rows = []  # per batch: (b * K, N + 1)
            for _ in range(0, len(chunk), batch_size):
                batch = next(batches)
                images.skipped.add(batch["index"], batch["skipped"])
                crops = cut_crops(batch["image"].to(ctx.device), dataset.preprocessing)  # (b, K, H, W, 3)
                is_bad = batch["skipped"].repeat_interleave(crops.shape[1])[:, None]
                codes = tokenizer.encode(to_float(crops.flatten(0, 1))).cpu()  # (b * K, N)
                rows.append(torch.cat([codes, is_bad], dim=1).numpy().astype(np.uint16))
            with chunk_files.writing(chunk) as partial, partial.open("wb") as file:
                np.save(file, np.concatenate(rows))
            if ctx.is_rank0:
                progress.update(len(images) - sum(map(len, chunk_files.missing())) - progress.n)


def join(
    chunk_files: ChunkFiles, store_path: Path, meta: StoreMeta, source: ImageSource, max_bad_fraction: float
) -> None:
    """Write the store from all chunks, one at a time, without the images that could not be read; raises InputError if
    too many are unreadable."""
    fault_point("join.begin", 0)
    bad: set[int] = set()
    with new_token_store(store_path, meta) as writer:
        for chunk in tqdm(chunk_files.chunks, desc=store_path.name, unit="chunk", delay=2):
            rows = np.load(chunk_files.path(chunk))
            labels = source.class_ids[chunk.start : chunk.stop].repeat(meta.crops_per_image)
            is_bad = rows[:, -1] > 0
            writer.append(rows[~is_bad, :-1], labels[~is_bad])
            bad |= {chunk.start + row // meta.crops_per_image for row in np.flatnonzero(is_bad).tolist()}
        check_unreadable(source, bad, max_bad_fraction)
        writer.meta.num_skipped = len(bad)
        fault_point("join.end", 0)


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
