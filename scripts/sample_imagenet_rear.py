"""Sample images from a trained reAR model into one npz for the ADM evaluator.

    torchrun --nproc_per_node=8 scripts/sample_imagenet_rear.py config=configs/rear_b.yaml \\
        experiment.output_dir=outputs/rear_b_samples experiment.generator_checkpoint=outputs/rear_b

Image i has class i mod C and depends on (weights, config, sampling.seed, i) only, so any number of processes gives the
same images, and no block of the file is sorted by class (the Inception Score needs that). With `sampling.class_labels`
the file holds the images of these classes alone, the same ones, and the classes take turns too.

Writes `<output_dir>.npz` (arr_0: uint8 NHWC images, arr_1: int64 labels), `<output_dir>.png` (a grid of some),
`<output_dir>.yaml` (the resolved config), `<output_dir>.json` (all that the images depend on, and the step
of the weights) and, with `sampling.save_png`, `<output_dir>.images/`. Where the tokenizer is a codebook alone, the
codes take the place of images: `<output_dir>.tokens`, a store as of scripts/pretokenize.py. While it runs, finished
batches lie in `<output_dir>.parts/`: the same command continues a killed run from there, with any number of processes.
What is complete is not made again.
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
    "dataset.params": "train_shards_path_or_url pretokenization",  # for names of classes
    "training": "enable_tf32",
    "sampling": "all",
}

if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(Config, __doc__, READS)

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from tqdm import tqdm

from data.codes.store_files import StoreMeta, check_codebook_size
from data.codes.token_writer import new_token_store
from data.training_batches import asked_classes
from modeling.sampling.image_decoder import ImageDecoder, KeptCodes
from modeling.sampling.image_inputs import asked_images, class_labels_of
from modeling.sampling.image_sampler import ImageSampler, images_made_from, load_trained
from modeling.tokenizers.registry import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import save_config
from utils.distributed import init_distributed
from utils.errors import InputError, NonFiniteError, input_errors_exit
from utils.files.lock import only_writer
from utils.files.npz import write_npz
from utils.files.provenance import is_made, write_record
from utils.files.sample_chunks import ChunkWriter, SampleChunks
from utils.images import make_grid, write_png
from utils.precision import matmul_precision

GRID_COLUMNS, GRID_IMAGES = 10, 50


def main(config: Config) -> None:
    with ExitStack() as held:
        sample(config, held)


def sample(config: Config, held: ExitStack) -> None:
    """Args:
    held: gets the lock of the output, from the first look at what is there to the end.
    """
    output, sampling = Path(config.experiment.output_dir), config.sampling
    tokenizer = load_tokenizer(config)
    result = output.with_name(output.name + (".npz" if tokenizer.has_images else ".tokens"))
    if not tokenizer.has_images:
        check_codebook_size(result, tokenizer.codebook_size)
        if sampling.save_png:
            raise tokenizer.no_images("sampling.save_png=true")
    with init_distributed() as ctx:  # left before the work begins: nothing later waits for a collective
        ctx.broadcast_from_rank0(lambda: held.enter_context(only_writer(output)))
        classes = ctx.broadcast_from_rank0(lambda: asked_classes(config))
        model, weights = load_trained(config, tokenizer, ctx)
        indices = asked_images(sampling, classes, model.num_classes)
        parts = SampleChunks(output.with_name(output.name + ".parts"), len(indices), sampling.per_gpu_batch_size)
        fingerprint = images_made_from(config, classes, indices, model, tokenizer, ctx.device)
        if ctx.broadcast_from_rank0(lambda: is_finished(parts, result, fingerprint)):
            return
        ctx.broadcast_from_rank0(lambda: check_neighbours(parts, output, result))
        missing = parts.begin(fingerprint, ctx)
    model.to(ctx.device).eval()
    tokenizer.to(ctx.device)
    progress = tqdm(missing[ctx.rank :: ctx.size], unit="batch", disable=not ctx.is_rank0)
    notice: Callable[[str], object] = print if ctx.is_rank0 else lambda line: None
    with matmul_precision(config.training.enable_tf32), ChunkWriter(parts, output, sampling.save_png) as writer:
        sampler = ImageSampler(model, tokenizer, config, len(parts.blocks[0]), notice)
        for block, images in sample_blocks(progress, indices, sampler, config):
            writer.write(block, images)
    if ctx.is_rank0:
        parts.wait()
        labels, origin = class_labels_of(indices, model.num_classes), str(weights.path.resolve())
        figures = {"step": weights.step, "weights": origin}
        if tokenizer.has_images:
            pack(parts, output, config, labels, fingerprint, figures)
        else:
            pack_codes(parts, result, tokenizer, config, labels, fingerprint, figures)


def is_finished(parts: SampleChunks, result: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether the npz or store of this run is there already; says so.

    Raises:
        InputError: that of another run is there.
    """
    if parts.claimed or not is_made(result, fingerprint):  # with parts, the run was killed at its end
        return False
    parts.remove()  # if it was killed while it deleted them
    print(f"{result}: made from the same weights and config already")
    return True


def check_neighbours(parts: SampleChunks, output: Path, result: Path) -> None:
    """
    Raises:
        InputError: a new run would add its PNG files to those of another one, or its record would take the place of
            that of images beside codes, or the reverse, or its config that of a config of the user's.
    """
    for suffix in (".npz", ".tokens"):
        other = output.with_name(output.name + suffix)
        if other != result and other.exists():
            raise InputError(f"{other}: is of another run, with the same name; delete it or choose another output_dir")
    if parts.folder.exists():  # of this run
        return
    written = output.with_name(output.name + ".yaml")
    if written.exists() and not result.with_suffix(".json").exists():
        raise InputError(f"{written}: exists, and the samples' config would replace it; choose another output_dir")
    folder = output.with_name(output.name + ".images")
    if folder.is_dir() and next(folder.iterdir(), None):
        raise InputError(f"{folder}: holds the images of another run; delete it or choose another output_dir")


def sample_blocks(
    blocks: Iterable[range], indices: list[int], sampler: ImageSampler, config: Config
) -> Iterator[tuple[range, np.ndarray]]:
    """Blocks of places with their images (B, H, W, 3) uint8, or codes (B, N) uint16 of a tokenizer without images; a
    GPU decodes one beside sampling the next.

    Args:
        indices: of the image at each place.
    """
    previous = None
    for block in blocks:
        codes = sampler.codes(indices[block.start : block.stop])
        if previous is not None:
            yield previous[0], finished(sampler.decoder, *previous, config)
        previous = block, sampler.decoder.start(codes)
    if previous is not None:
        yield previous[0], finished(sampler.decoder, *previous, config)


def finished(decoder: ImageDecoder | KeptCodes, block: range, pending: Any, config: Config) -> np.ndarray:
    """
    Raises:
        InputError: logits or pixels that are not finite, with the images and the weights.
    """
    try:
        return decoder.finish(pending)
    except NonFiniteError as error:
        raise InputError(
            f"images {block.start} to {block.stop - 1}: {error} (experiment.generator_checkpoint="
            f"{config.experiment.generator_checkpoint}, tokenizer_checkpoint={config.experiment.tokenizer_checkpoint})"
        ) from error


def pack(
    parts: SampleChunks,
    output: Path,
    config: Config,
    labels: np.ndarray,
    fingerprint: dict[str, Any],
    figures: dict[str, Any],
) -> None:
    """Gather the parts into the npz, a part at a time, and remove them. The npz comes last: with it all is there.

    Args:
        labels: (n,) int64, of all images.
        figures: what to record beside the fingerprint; other ones make no other samples.
    """
    first_images = parts.first_images(GRID_IMAGES)
    write_png(output.with_name(output.name + ".png"), make_grid(first_images, GRID_COLUMNS))
    save_config(config, output.with_name(output.name + ".yaml"))
    npz = output.with_name(output.name + ".npz")
    images = tqdm(parts.load(), desc=npz.name, total=len(parts.blocks), unit="part")
    write_npz(
        npz,
        {
            "arr_0": ((len(labels), *first_images.shape[1:]), np.uint8, images),
            "arr_1": (labels.shape, np.int64, [labels]),
        },
    )
    write_record(npz, fingerprint, figures={"bytes": npz.stat().st_size, **figures})
    parts.remove()
    print(f"{len(labels)} images in {npz}")


def pack_codes(
    parts: SampleChunks,
    store: Path,
    tokenizer: Tokenizer,
    config: Config,
    labels: np.ndarray,
    fingerprint: dict[str, Any],
    figures: dict[str, Any],
) -> None:
    """As `pack`, of codes, into a token store."""
    save_config(config, store.with_suffix(".yaml"))
    meta = StoreMeta(tokenizer.image_seq_len, tokenizer.codebook_size, tokenizer_sha256=tokenizer.sha256())
    with new_token_store(store, meta) as writer:
        for block, codes in zip(parts.blocks, parts.load(), strict=True):
            writer.append(codes, labels[block.start : block.stop])
    write_record(store, fingerprint, figures=figures)
    parts.remove()
    print(
        f"{len(labels)} samples in {store}: decode its tokens.npy, uint16 {len(labels), tokenizer.image_seq_len}, with "
        "the tokenizer that the codes are from; their classes are in class_ids.npy"
    )


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
