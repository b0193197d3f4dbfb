"""Sample images from a trained reAR model into one npz for the ADM evaluator.

    torchrun --nproc_per_node=8 scripts/sample_imagenet_rear.py config=configs/rear_b.yaml \\
        experiment.output_dir=outputs/rear_b_samples experiment.generator_checkpoint=outputs/rear_b

Image i has class i mod C and depends on (weights, config, sampling.seed, i) only, so the images do not depend on the
number of processes, and no part of the file is sorted by class (the Inception Score needs that). With
`sampling.class_labels` the file holds only these classes, alternating; their images are the same as without it.

Writes `<output_dir>.npz` (arr_0: uint8 NHWC images, arr_1: int64 labels), `<output_dir>.png` (a grid of the first),
`<output_dir>.yaml` (the resolved config), `<output_dir>.json` (the provenance of the images, the step of the weights)
and, with `sampling.save_png`, `<output_dir>.images/`. If the tokenizer is only a codebook, it writes codes instead of
images: `<output_dir>.tokens`, a store as of scripts/pretokenize.py. Finished batches are in
`<output_dir>.chunks/` meanwhile; rerun the same command, with any number of processes, to resume a killed run. Complete
output is not sampled again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import load_config_or_exit
from utils.schema import Config

READS = {
    "experiment": "output_dir tokenizer_checkpoint generator_checkpoint allow_other_tokenizer",
    "model": "all",
    "dataset.params": "train_shards_path_or_url pretokenization cache_dir cache_size_gb",  # for class names
    "training": "enable_tf32",
    "sampling": "all",
}

if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(Config, __doc__, READS)

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from data.codes.store_files import StoreMeta
from data.codes.token_writer import new_token_store
from data.training_batches import classes_to_sample
from modeling.loading import load_generator, load_tokenizer
from modeling.sampling.image_sampler import (
    ImageDecoder,
    ImageSampler,
    PassThroughDecoder,
    asked_images,
    class_labels_of,
)
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import save_config
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, NonFiniteError, input_errors_exit
from utils.files.npz import write_npz
from utils.files.provenance import is_made, write_record
from utils.files.sample_chunks import ChunkWriter, SampleChunks
from utils.images import make_grid, write_png
from utils.precision import matmul_precision
from utils.run.image_provenance import image_provenance
from utils.run.weights_path import find_generator_weights
from utils.token_ids import token_dtype

GRID_COLUMNS, GRID_IMAGES = 10, 50


def main(config: Config) -> None:
    output = Path(config.experiment.output_dir)
    tokenizer = load_tokenizer(config)
    if config.sampling.save_png and not tokenizer.has_images:
        raise tokenizer.no_images("sampling.save_png=true")
    with init_distributed() as ctx, ctx.locked(output):
        sample(config, tokenizer, output, ctx)


def sample(config: Config, tokenizer: Tokenizer, output: Path, ctx: DistributedContext) -> None:
    sampling = config.sampling
    weights, config = find_generator_weights(config, tokenizer.sha256(), ctx)
    classes = ctx.broadcast_from_rank0(classes_to_sample, config, weights)
    model = load_generator(weights.path, config.model)
    indices = asked_images(sampling, classes, model.num_classes)
    provenance = image_provenance(
        config, class_labels=classes, indices=indices, model=model, tokenizer=tokenizer, device=ctx.device
    )
    result = output.with_name(output.name + (".npz" if tokenizer.has_images else ".tokens"))
    chunk_files = SampleChunks(output.with_name(output.name + ".chunks"), len(indices), sampling.per_gpu_batch_size)
    png_folder = output.with_name(output.name + ".images") if sampling.save_png else None
    if ctx.broadcast_from_rank0(is_finished, chunk_files, result, provenance, png_folder):
        return
    ctx.broadcast_from_rank0(check_other_outputs, chunk_files, output, result)
    missing = chunk_files.open_on_all_ranks(provenance, ctx)
    model.to(ctx.device).eval()
    tokenizer.to(ctx.device)
    progress = tqdm(missing[ctx.rank :: ctx.size], unit="batch", disable=not ctx.is_rank0)
    with matmul_precision(config.training.enable_tf32), ChunkWriter(chunk_files, png_folder) as writer:
        sampler = ImageSampler(model, tokenizer, config, len(chunk_files.chunks[0]), ctx.print_on_rank0)
        for chunk, images in sample_chunks(progress, indices, sampler, config):
            writer.write(chunk, images)
    if not ctx.is_rank0:
        return
    chunk_files.wait()
    labels = class_labels_of(indices, model.num_classes)
    figures = {"step": weights.step, "weights": str(weights.path.resolve())}
    if tokenizer.has_images:
        pack(chunk_files, result, config, labels, provenance, figures)
    else:
        pack_codes(chunk_files, result, tokenizer, config, labels, provenance, figures)


def is_finished(chunk_files: SampleChunks, result: Path, provenance: dict[str, Any], png_folder: Path | None) -> bool:
    """Whether the npz or store of this run, and its PNG files, are complete, which is printed; raises InputError for
    output of another run, or damaged output."""
    if chunk_files.can_resume or not is_made(result, provenance):  # chunks: the run was killed at its end
        return False
    num_images = chunk_files.chunks[-1].stop
    if png_folder is not None and (found := len(list(png_folder.glob("*.png")))) != num_images:
        raise InputError(f"{png_folder}: found {found} images, expected {num_images}; delete {result} to sample again")
    chunk_files.remove()  # a run may have been killed while it deleted them
    print(f"{result}: already made from the same weights and config")
    return True


def check_other_outputs(chunk_files: SampleChunks, output: Path, result: Path) -> None:
    """Raise InputError if this run would replace files of another run or mix with them: images next to codes, a user's
    config, or PNG files."""
    for suffix in (".npz", ".tokens"):
        other = output.with_name(output.name + suffix)
        if other != result and other.exists():
            raise InputError(f"{other}: is of another run of the same name; delete it or choose another output_dir")
    if chunk_files.folder.exists():  # of this run
        return
    written = output.with_name(output.name + ".yaml")
    if written.exists() and not result.with_suffix(".json").exists():
        raise InputError(f"{written}: exists, and the samples' config would replace it; choose another output_dir")
    folder = output.with_name(output.name + ".images")
    if folder.is_dir() and next(folder.iterdir(), None):
        raise InputError(f"{folder}: holds the images of another run; delete it or choose another output_dir")


def sample_chunks(
    chunks: Iterable[range], indices: list[int], sampler: ImageSampler, config: Config
) -> Iterator[tuple[range, np.ndarray]]:
    """Yield each chunk of `indices` with its images (B, H, W, 3) uint8, or codes (B, N) of a tokenizer without
    images. A GPU decodes a chunk while it samples the next."""
    last_chunk, pending = None, None
    for chunk in chunks:
        codes = sampler.codes(indices[chunk.start : chunk.stop])
        if last_chunk is not None:
            yield last_chunk, finish(sampler.decoder, pending, last_chunk, config)
        last_chunk = chunk
        pending = sampler.decoder.start(codes)
    if last_chunk is not None:
        yield last_chunk, finish(sampler.decoder, pending, last_chunk, config)


def finish(decoder: ImageDecoder | PassThroughDecoder, pending: Any, chunk: range, config: Config) -> np.ndarray:
    """Raises InputError, with the images and weights, for logits or pixels that are not finite."""
    try:
        return decoder.finish(pending)
    except NonFiniteError as error:
        raise InputError(
            f"images {chunk.start} to {chunk.stop - 1}: {error} (experiment.generator_checkpoint="
            f"{config.experiment.generator_checkpoint}, tokenizer_checkpoint={config.experiment.tokenizer_checkpoint})"
        ) from error


def pack(
    chunk_files: SampleChunks,
    npz: Path,
    config: Config,
    labels: np.ndarray,
    provenance: dict[str, Any],
    figures: dict[str, Any],
) -> None:
    """Gather the chunks, one at a time, in the npz and delete them. The npz is the last file to appear.

    `labels`: (n,) int64, of all images; `figures`: facts to record with the provenance.
    """
    first_images = chunk_files.first_images(GRID_IMAGES)
    write_png(npz.with_suffix(".png"), make_grid(first_images, GRID_COLUMNS))
    save_config(config, npz.with_suffix(".yaml"))
    images = tqdm(chunk_files.load(), desc=npz.name, total=len(chunk_files.chunks), unit="chunk")
    write_npz(
        npz,
        {
            "arr_0": ((len(labels), *first_images.shape[1:]), np.uint8, images),
            "arr_1": (labels.shape, np.int64, [labels]),
        },
    )
    write_record(npz, provenance, figures=figures, files=[npz])
    chunk_files.remove()
    print(f"{len(labels)} images in {npz}")


def pack_codes(
    chunk_files: SampleChunks,
    store: Path,
    tokenizer: Tokenizer,
    config: Config,
    labels: np.ndarray,
    provenance: dict[str, Any],
    figures: dict[str, Any],
) -> None:
    """Like `pack`, but codes in a token store."""
    save_config(config, store.with_suffix(".yaml"))
    meta = StoreMeta(tokenizer.image_seq_len, tokenizer.codebook_size, tokenizer_sha256=tokenizer.sha256())
    with new_token_store(store, meta) as writer:
        for chunk, codes in zip(chunk_files.chunks, chunk_files.load(), strict=True):
            writer.append(codes, labels[chunk.start : chunk.stop])
    write_record(store, provenance, figures=figures, files=sorted(store.iterdir()))
    chunk_files.remove()
    print(
        f"{len(labels)} samples in {store}: decode its tokens.npy, {token_dtype(tokenizer.codebook_size)} "
        f"{len(labels), tokenizer.image_seq_len}, with the tokenizer of the codes; their classes are in class_ids.npy"
    )


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
