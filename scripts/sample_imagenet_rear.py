"""Sample images from a trained reAR model into one npz for the ADM evaluator.

    torchrun --nproc_per_node=8 scripts/sample_imagenet_rear.py config=configs/rear_b.yaml \\
        experiment.output_dir=outputs/rear_b_samples experiment.generator_checkpoint=outputs/rear_b

Image i has class i mod C and depends on (weights, config, sampling.seed, i) only, so any number of processes gives the
same images, and no block of the file is sorted by class (the Inception Score needs that).

Writes `<output_dir>.npz` (arr_0: uint8 NHWC images, arr_1: int64 labels), `<output_dir>.png` (a grid of some),
`<output_dir>.yaml` (the resolved config), `<output_dir>.json` (all that the images depend on, and the step
of the weights) and, with `sampling.save_png`, `<output_dir>.images/`. Where the tokenizer is a codebook alone, the
codes take the place of images: `<output_dir>.tokens`, a store as of scripts/pretokenize.py. While it runs, finished
batches lie in `<output_dir>.parts/`: the same command continues a killed run from there, with any number of processes.
What is complete is not made again.
"""

import sys
from pathlib import Path

READS = (
    *("experiment.output_dir", "experiment.tokenizer_checkpoint", "experiment.generator_checkpoint"),
    *("experiment.allow_other_tokenizer", "model", "training.enable_tf32", "sampling"),
)

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory
    from utils.config import load_config_or_exit

    CONFIG = load_config_or_exit(__doc__, READS)

import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.codes.store_files import StoreMeta, check_codebook_size
from data.codes.token_writer import new_token_store
from modeling.rear import ReAR, load_generator
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_decoder import ImageDecoder, KeptCodes
from modeling.sampling.image_inputs import class_labels_of, image_inputs, image_orders
from modeling.tokenizers.registry import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import Config, flat, save_config
from utils.errors import InputError, NonFiniteError, input_errors_exit
from utils.files.atomic import complete_file
from utils.files.lock import only_writer
from utils.files.made_from import is_made, write_record
from utils.files.npz import write_npz
from utils.files.sample_parts import PartWriter, SampleParts
from utils.files.weights import weights_sha256
from utils.images import make_grid, write_png
from utils.precision import matmul_precision
from utils.ranks import join_world
from utils.run.folder import code_facts
from utils.run.trained_weights import find_trained_weights

GRID_COLUMNS, GRID_IMAGES = 10, 50


def main(config: Config) -> None:
    with ExitStack() as held:
        sample(config, held)


def sample(config: Config, held: ExitStack) -> None:
    """Args:
    held: gets the lock of the output, from the first look at what is there to the end.
    """
    source, sampling = config.experiment.generator_checkpoint, config.sampling
    if source is None:
        raise InputError("experiment.generator_checkpoint: missing; give a weights file, a checkpoint or a run folder")
    output, tokenizer = Path(config.experiment.output_dir), load_tokenizer(config)
    result = output.with_name(output.name + (".npz" if tokenizer.has_images else ".tokens"))
    if not tokenizer.has_images:
        check_codebook_size(result, tokenizer.codebook_size)
        if sampling.save_png:
            raise tokenizer.no_images("sampling.save_png=true")
    with join_world() as world:  # left before the work begins: nothing later waits for a collective
        world.from_main(lambda: held.enter_context(only_writer(output)))
        parts_folder = output.with_name(output.name + ".parts")
        parts = SampleParts(parts_folder, sampling.num_fid_samples, sampling.per_gpu_batch_size)
        weights = world.from_main(lambda: find_trained_weights(source))
        for notice in weights.notices if world.is_main else []:
            print(notice)
        weights.check_tokenizer(tokenizer.sha256(), config.experiment)
        model = load_generator(weights.path, config.model)
        fingerprint = fingerprint_of(config, model, tokenizer, world.device)
        if world.from_main(lambda: is_finished(parts, result, fingerprint)):
            return
        world.from_main(lambda: check_images_folder(parts, output))
        missing = parts.begin(fingerprint, world)
    model.to(world.device).eval()
    tokenizer.to(world.device)
    progress = tqdm(missing[world.rank :: world.size], unit="batch", disable=not world.is_main)
    precision = matmul_precision(config.training.enable_tf32)
    with precision, PartWriter(parts, output, sampling.save_png) as writer:
        for block, images in sample_blocks(progress, model, tokenizer, config, notices=world.is_main):
            writer.write(block, images)
    if world.is_main:
        parts.wait()
        figures = {"step": weights.step, "weights": str(weights.path.resolve())}
        if tokenizer.has_images:
            pack(parts, output, config, fingerprint, figures)
        else:
            pack_codes(parts, result, tokenizer, config, fingerprint, figures)


def is_finished(parts: SampleParts, result: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether the npz or store of this run is there already; says so.

    Raises:
        InputError: that of another run is there.
    """
    # with parts, it is what a run that was killed at its end has left
    if parts.folder.exists() or not is_made(result, fingerprint):
        return False
    print(f"{result}: made from the same weights and config already")
    return True


def check_images_folder(parts: SampleParts, output: Path) -> None:
    """
    Raises:
        InputError: a new run would add its PNG files to those of another one.
    """
    folder = output.with_name(output.name + ".images")
    if folder.is_dir() and not parts.folder.exists() and next(folder.iterdir(), None):
        raise InputError(f"{folder}: holds the images of another run; delete it or choose another output_dir")


def fingerprint_of(config: Config, model: ReAR, tokenizer: Tokenizer, device: torch.device) -> dict[str, Any]:
    """All that the images depend on, by config key."""
    sections = {"model": dataclasses.asdict(config.model), "sampling": dataclasses.asdict(config.sampling)}
    return {
        **dict(flat(sections)),
        "training.enable_tf32": config.training.enable_tf32,
        "device": device.type,
        "sha256 of experiment.generator_checkpoint": weights_sha256(model),
        "sha256 of experiment.tokenizer_checkpoint": tokenizer.sha256(),
        **code_facts(),
    }


def sample_blocks(
    blocks: Iterable[range], model: ReAR, tokenizer: Tokenizer, config: Config, notices: bool
) -> Iterator[tuple[range, np.ndarray]]:
    """Blocks of indices with their images (B, H, W, 3) uint8, or codes (B, N) uint16 of a tokenizer without images; a
    GPU decodes one block beside sampling the next.

    The last block is filled up with its last index while it is sampled: a batch of another size would be compiled anew,
    and its codes could depend on what this process has sampled before.

    Args:
        notices: print what `sampling.compile=auto` had to give up.
    """
    sampling, device = config.sampling, model.cls_token.device
    reduced = sampling.mixed_precision == "bf16" or (sampling.mixed_precision == "auto" and device.type == "cuda")
    sampler = CodeSampler(
        model,
        config.model.generator,
        torch.bfloat16 if reduced else torch.float32,
        sampling.compile,
        notice=print if notices else lambda line: None,
    )
    half_decoder = reduced and device.type == "cuda"
    decoder: ImageDecoder | KeptCodes = KeptCodes(tokenizer.codebook_size)
    if tokenizer.has_images:
        decoder = ImageDecoder(tokenizer, sampling.uint8_rule, torch.float16 if half_decoder else torch.float32)
    size, previous = min(sampling.per_gpu_batch_size, sampling.num_fid_samples), None
    for block in blocks:
        indices = [*block, *[block[-1]] * (size - len(block))]
        orders = image_orders(indices, model.image_seq_len, sampling)
        codes = sampler(*image_inputs(indices, model, sampling.seed), orders=orders)[: len(block)]
        if previous is not None:
            yield previous[0], finished(decoder, *previous, config)
        previous = block, decoder.start(codes)
    if previous is not None:
        yield previous[0], finished(decoder, *previous, config)


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


def save_yaml(config: Config, path: Path) -> None:
    with complete_file(path) as partial:
        save_config(config, partial)


def pack(
    parts: SampleParts, output: Path, config: Config, fingerprint: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Gather the parts into the npz, a part at a time, and remove them. The npz comes last: with it all is there.

    Args:
        figures: what to record beside the fingerprint; other ones make no other samples.
    """
    n = config.sampling.num_fid_samples
    first_images = parts.first_images(GRID_IMAGES)
    write_png(output.with_name(output.name + ".png"), make_grid(first_images, GRID_COLUMNS))
    save_yaml(config, output.with_name(output.name + ".yaml"))
    labels = class_labels_of(range(n), config.model.generator.condition_num_classes)
    npz = output.with_name(output.name + ".npz")
    images = tqdm(parts.load(), desc=npz.name, total=len(parts.blocks), unit="part")
    write_npz(
        npz,
        {
            "arr_0": ((n, *first_images.shape[1:]), np.uint8, images),
            "arr_1": (labels.shape, np.int64, [labels]),
        },
    )
    write_record(npz, fingerprint, figures={"bytes": npz.stat().st_size, **figures})
    shutil.rmtree(parts.folder)
    print(f"{n} images in {npz}")


def pack_codes(
    parts: SampleParts,
    store: Path,
    tokenizer: Tokenizer,
    config: Config,
    fingerprint: dict[str, Any],
    figures: dict[str, Any],
) -> None:
    """As `pack`, of codes, into a token store."""
    labels = class_labels_of(range(config.sampling.num_fid_samples), config.model.generator.condition_num_classes)
    save_yaml(config, store.with_suffix(".yaml"))
    meta = StoreMeta(tokenizer.image_seq_len, tokenizer.codebook_size, tokenizer_sha256=tokenizer.sha256())
    with new_token_store(store, meta) as writer:
        for block, codes in zip(parts.blocks, parts.load(), strict=True):
            writer.append(codes, labels[block.start : block.stop])
    write_record(store, fingerprint, figures=figures)
    shutil.rmtree(parts.folder)
    print(
        f"{len(labels)} samples in {store}: decode its tokens.npy, uint16 {len(labels), tokenizer.image_seq_len}, with "
        "the tokenizer that the codes are from; their classes are in class_ids.npy"
    )


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
