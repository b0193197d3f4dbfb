"""Turn images into tokenizer codes, once, so that training reads codes instead of images.

    torchrun --nproc_per_node=8 scripts/pretokenize.py config=configs/rear_b.yaml \\
        dataset.params.train_shards_path_or_url="imagenet-train-{000000..000252}.tar" \\
        dataset.params.pretokenization=maskgitvq.jsonl

Reads the images of `dataset.params.train_shards_path_or_url` in their order, cuts each into the crops of
`dataset.preprocessing.pretokenize_crops` and encodes them with `experiment.tokenizer_checkpoint`, on GPUs if there
are some: `training.per_gpu_batch_size` crops at a time, read by `dataset.params.num_workers_per_gpu` processes each.
Any number of processes gives the same bytes; without torchrun it is one.

Writes `dataset.params.pretokenization`: a .tokens store or, if the name ends in .jsonl, that file and the store beside
it. Both appear when they are complete. Samples are in the order of the images, the crops of an image side by side.
While it runs, finished blocks of images lie in `<name>.tokens.parts/`: the same command continues a killed run.
"""

import sys
from pathlib import Path

READS = (
    *("experiment.tokenizer_checkpoint", "model.vq_model", "model.generator.condition_num_classes"),
    *("dataset.params.pretokenization", "dataset.params.train_shards_path_or_url"),
    *("dataset.params.num_workers_per_gpu", "dataset.params.on_bad_sample", "dataset.params.max_bad_fraction"),
    "dataset.preprocessing",
    *("-dataset.preprocessing.random_crop", "-dataset.preprocessing.random_flip"),
    *("training.per_gpu_batch_size", "training.enable_tf32", "training.seed"),
)

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory
    from utils.config import load_config_or_exit

    CONFIG = load_config_or_exit(__doc__, READS)

import time
from contextlib import ExitStack
from dataclasses import asdict
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
from data.images.transforms import cut_crops, pretokenize_transform
from data.loading import Batches
from modeling.tokenizers.registry import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import Config
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, TrainingError, input_errors_exit
from utils.faults import fault_point
from utils.files.chunk_files import ChunkFiles
from utils.files.lock import only_writer
from utils.images import to_float
from utils.precision import matmul_precision
from utils.processes import num_cpus
from utils.run.signals import StopSignals
from utils.schema import DatasetConfig

IMAGES_PER_PART = 256  # or the next multiple of what is encoded at once


def main(config: Config) -> None:
    with ExitStack() as held:
        pretokenize(config, held)


def pretokenize(config: Config, held: ExitStack) -> None:
    """Args:
    held: gets the lock of the store, from the first look at what is there to the end.
    """
    image_path, output = checked_paths(config)
    store_path = output.with_suffix(".tokens")
    tokenizer = load_tokenizer(config)
    if not tokenizer.has_images:
        raise tokenizer.no_images(f"dataset.params.train_shards_path_or_url={image_path}")
    params, preprocessing = config.dataset.params, config.dataset.preprocessing
    num_classes, decoding = config.model.generator.condition_num_classes, ImageDecoding.of(preprocessing)
    source = open_images(image_path, num_classes, decoding)
    max_bad_fraction = allowed_bad_fraction(params)
    images = ImageDataset(source, pretokenize_transform(preprocessing), config.training.seed, max_bad_fraction)
    crops = cut_crops(images[0]["image"][None], preprocessing).shape[1]
    batch_size = max(1, config.training.per_gpu_batch_size // crops)
    # A batch never reaches into another part: kernels may round differently for another batch size.
    block_size = -(-IMAGES_PER_PART // batch_size) * batch_size
    parts = ChunkFiles(store_path.with_name(store_path.name + ".parts"), len(images), block_size, ".npy")
    with init_distributed() as ctx:  # left before the work begins: nothing later waits for a collective
        ctx.broadcast_from_rank0(lambda: held.enter_context(only_writer(store_path)))
        meta = describe(config, tokenizer, images, crops, ctx.device)
        if store_path.is_dir():
            check_finished(TokenStore(store_path), meta)
            missing = []
        else:
            fingerprint = {**asdict(meta), **(meta.settings or {}), "settings": None, "images per part": block_size}
            missing = parts.begin(fingerprint, ctx)
    started, at_start = time.perf_counter(), sum(map(len, missing))
    if missing:
        mine = missing[ctx.rank :: ctx.size]
        with matmul_precision(config.training.enable_tf32):
            encode(mine, parts, images, tokenizer.to(ctx.device), batch_size, config.dataset, ctx)
    if not ctx.is_rank0:
        return
    if not store_path.is_dir():
        parts.wait()
        seconds = time.perf_counter() - started
        print(f"{at_start} images encoded, {at_start / seconds:.1f} images/s on {ctx.size} x {ctx.device.type}")
        join(parts, store_path, meta, source, max_bad_fraction)
    store = TokenStore(store_path)
    if output.suffix == ".jsonl":
        with only_writer(output):
            store_to_jsonl(store_path, output, num_cpus())
    parts.remove()
    left_out = f", {store.meta.num_skipped} left out" if store.meta.num_skipped else ""
    print(f"{output}: {len(images)} images{left_out}, {len(store)} samples")


def checked_paths(config: Config) -> tuple[str, Path]:
    """The images to read, and the file or store to write.

    Raises:
        InputError: a key of the config is missing or wrong.
    """
    images, codes = config.dataset.params.train_shards_path_or_url, config.dataset.params.pretokenization
    if images is None or codes is None:
        key = "train_shards_path_or_url" if images is None else "pretokenization"
        raise InputError(f"dataset.params.{key}: missing; give the images to read and the codes to write")
    output = Path(codes)
    if output.suffix not in (".jsonl", ".tokens"):
        raise InputError(f"dataset.params.pretokenization={output}: expected a name that ends in .jsonl or .tokens")
    if output.exists() and not output.with_suffix(".tokens").exists():
        raise InputError(f"{output}: exists, and no store beside it tells that it is from here; choose another name")
    if config.model.vq_model.codebook_size > MAX_CODEBOOK_SIZE:
        raise InputError(
            f"model.vq_model.codebook_size={config.model.vq_model.codebook_size}: expected at most {MAX_CODEBOOK_SIZE}"
        )
    return images, output


def describe(config: Config, tokenizer: Tokenizer, images: ImageDataset, crops: int, device: torch.device) -> StoreMeta:
    """All that the codes depend on."""
    preprocessing = config.dataset.preprocessing
    settings: dict[str, Any] = {
        f"dataset.preprocessing.{key}": getattr(preprocessing, key)
        for key in ("resize_shorter_edge", "crop_size", "pretokenize_crops")
    }
    changed = {key: getattr(preprocessing, key) for key in vars(ImageDecoding())}
    defaults = vars(ImageDecoding())  # left out: as in stores that are older than these keys
    settings |= {f"dataset.preprocessing.{key}": value for key, value in changed.items() if value != defaults[key]}
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


def check_finished(store: TokenStore, meta: StoreMeta) -> None:
    """
    Raises:
        InputError: the store that is there already is another one than this command would write.
    """
    for key in ("tokenizer_sha256", "source_sha256", "class_names", "settings"):
        found, expected = getattr(store.meta, key), getattr(meta, key)
        if found != expected:
            raise InputError(
                f"{store.path}: exists and was made otherwise: {key} is {found}, expected {expected}; "
                "delete it or write to another dataset.params.pretokenization"
            )


@torch.inference_mode()
def encode(
    blocks: list[range],
    parts: ChunkFiles,
    images: ImageDataset,
    tokenizer: Tokenizer,
    batch_size: int,
    dataset: DatasetConfig,
    ctx: DistributedContext,
) -> None:
    """Write the parts of some blocks: per sample its codes, and 1 if its image is one to leave out. The main process
    shows the progress of all processes."""
    items = [list(block[i : i + batch_size]) for block in blocks for i in range(0, len(block), batch_size)]
    on_gpu, launcher = ctx.device.type == "cuda", StopSignals()
    batches = Batches(images, items, dataset.params.num_workers_per_gpu, on_gpu)
    initial = len(images) - sum(map(len, parts.missing()))
    with tqdm(total=len(images), initial=initial, unit="image", smoothing=0, disable=not ctx.is_rank0) as progress:
        for block in blocks:
            rows = []  # per batch: (b * K, N + 1)
            for _ in range(0, len(block), batch_size):
                batch = next(batches)
                images.skipped.add(batch["index"], batch["skipped"])
                crops = cut_crops(batch["image"].to(ctx.device), dataset.preprocessing)  # (b, K, H, W, 3)
                is_bad = batch["skipped"].repeat_interleave(crops.shape[1])[:, None]
                codes = tokenizer.encode(to_float(crops.flatten(0, 1))).cpu()  # (b * K, N)
                rows.append(torch.cat([codes, is_bad], dim=1).numpy().astype(np.uint16))
            if launcher.requested():
                raise TrainingError("torchrun is gone; the same command continues")
            with parts.writing(block) as partial, partial.open("wb") as file:
                np.save(file, np.concatenate(rows))
            if ctx.is_rank0:
                progress.update(len(images) - sum(map(len, parts.missing())) - progress.n)


def join(parts: ChunkFiles, store_path: Path, meta: StoreMeta, source: ImageSource, max_bad_fraction: float) -> None:
    """Write the store from all parts, a part at a time, without the images that could not be read.

    Raises:
        InputError: there are too many of these.
    """
    fault_point("join.begin", 0)
    bad: set[int] = set()
    with new_token_store(store_path, meta) as writer:
        for block in tqdm(parts.blocks, desc=store_path.name, unit="part", delay=2):
            rows = np.load(parts.path(block))
            labels = source.class_ids[block.start : block.stop].repeat(meta.crops_per_image)
            is_bad = rows[:, -1] > 0
            writer.append(rows[~is_bad, :-1], labels[~is_bad])
            bad |= {block.start + row // meta.crops_per_image for row in np.flatnonzero(is_bad).tolist()}
        check_unreadable(source, bad, max_bad_fraction)
        writer.meta.num_skipped = len(bad)
        fault_point("join.end", 0)


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
