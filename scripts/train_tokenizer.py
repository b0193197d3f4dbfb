"""Train a tokenizer with a codebook on images: reconstruction, vector-quantization, perceptual and, for
`vq_training.adversarial_weight` > 0, adversarial losses.

    OMP_WAIT_POLICY=PASSIVE python scripts/train_tokenizer.py config=configs/tokenizer_blue_marble.yaml

Reads `dataset.params.train_shards_path_or_url` and, for validation, `eval_shards_path_or_url`. Rerun the same command
to resume, as in train_rear.py; `vq_training.init_from` starts a new run from weights. With
`torchrun --nproc_per_node=8` instead of `python`, eight processes share a step.

Writes to `experiment.output_dir`: config.yaml, environment.txt, log.txt, metrics.jsonl, status.json,
checkpoint-<step>/, training_curves.png and, every `experiment.save_every` steps and at the end, tokenizer.safetensors
(float16), metrics.json (metrics of at most 2,000 held-out images), reconstructions.png (held-out originals above
reconstructions) and worst.png (those with the largest errors). At the end, metrics.json and the log have a verdict:
what the tokenizer loses, compared with k-means of raw patches, and what to do. The exit status is 75 after a stop
signal.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import load_config_or_exit
from utils.config_checks import check_schedules
from utils.keys import NonNegativeFloat, NonNegativeInt, PositiveInt, key, section
from utils.schema import Config

PositiveFraction = Annotated[float, Meta(gt=0, le=1)]
READS = {
    "experiment": "all but max_train_examples generate_every eval_every eval_samples save_weights_every init_from "
    "tokenizer_checkpoint generator_checkpoint",
    "model.vq_model": "all",
    "dataset.params": "all but pretokenization eval_pretokenization verify_hashes",
    "dataset.preprocessing": "all but pretokenize_crops",
    "optimizer": "all",
    "lr_scheduler": "all",
    "training": "all but fsdp compile",
    "sampling": "uint8_rule",
    "vq_training": "all",
}


@dataclass
class VQTrainingConfig:
    """Losses of tokenizer training."""

    init_from: str | None = key(None, "tokenizer weights to start from; null: random")
    commitment_weight: NonNegativeFloat = key(0.25, "beta of the VQ-VAE loss")
    entropy_weight: NonNegativeFloat = key(
        0.0, "weight of the mean entropy of the token probabilities minus the entropy of their mean"
    )
    l2_weight: NonNegativeFloat = key(1.0, "weight of the squared error; the absolute error has weight 1")
    color_weight: NonNegativeFloat = key(0.0, "weight of the absolute error of the color, the difference to grey")
    perceptual_weight: NonNegativeFloat = key(0.1, "weight of the distance between EfficientNet-Lite0 features")
    adversarial_weight: NonNegativeFloat = key(0.0, "weight of the discriminator on the same features; 0: none")
    perceptual_start: NonNegativeInt = key(0, "step from which on features are computed, for both terms")
    perceptual_fraction: PositiveFraction = key(1.0, "fraction of each batch whose features are computed")
    codebook_init: Literal["latents", "kmeans"] = key(
        "latents",
        "latents: vectors are latents of the first batch; kmeans: k-means of latents of many training images, from "
        "which patch_vq first computes principal components",
    )
    revive_every: PositiveInt = key(100, "steps between replacements of the codebook vectors unused since the last one")


@dataclass
class TrainTokenizerConfig(Config):
    vq_training: VQTrainingConfig = section(VQTrainingConfig)


if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(TrainTokenizerConfig, __doc__, READS, check=check_schedules)

import json
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data.batch_sampler import permutation_of_pass
from data.images.image_io import ImageDecoding
from data.images.reading import ImageDataset, allowed_bad_fraction, open_images
from data.images.shard_cache import ShardCache
from data.images.transforms import training_transform
from data.loading import Batches, on_device
from data.training_batches import TrainingBatches
from data.validation_data import open_center_crops
from evaluation.patch_baseline import PatchBaseline
from evaluation.reconstruction import ReconstructionMetrics
from evaluation.tokenizer_verdict import distance_of_reconstructions, verdict, worst_first
from modeling.tokenizers.discriminator import FeatureDiscriminator, discriminator_loss, generator_loss
from modeling.tokenizers.perceptual import PerceptualFeatures, perceptual_distance
from modeling.tokenizers.registry import build_trainable_tokenizer
from modeling.tokenizers.tokenizer import TrainableTokenizer
from modeling.tokenizers.vector_quantizer import entropy_loss
from utils.distributed import DistributedContext
from utils.errors import InputError, input_errors_exit
from utils.files.atomic import write_text
from utils.files.hub import local_file
from utils.files.weights import save_weights
from utils.images import make_grid, to_uint8, write_png
from utils.kmeans import k_means
from utils.optim import MovingAverage, build_optimizers, describe_optimizers, set_learning_rate
from utils.precision import autocast
from utils.randomness import dropout_seed
from utils.run.launch import launch
from utils.run.run_environment import log_and_continue
from utils.run.status import EXIT_STATUS
from utils.run.training_run import TrainingRun
from utils.timing import median_seconds

GRID_COLUMNS, GRID_ROWS = 16, 4  # a row of originals and the row of their reconstructions count as one
NUM_WORST = 10  # in worst.png
MAX_EVALUATED, MAX_COMPARED = 2_000, 500  # held-out images, and those whose Frechet distance is computed
COMPARED = ("psnr", "ssim", "hue_error", "saturation_error")  # with k-means of patches
MIN_INIT_IMAGES, INIT_PIXELS = 64, 2**21  # for codebook_init=kmeans: at least so many images, or pixels


def main(config: TrainTokenizerConfig) -> str:
    """Train until the last step or a stop; returns the status in `status.json`."""
    training, vq_training = config.training, config.vq_training
    with launch(config) as launched:
        ctx, device = launched.ctx, launched.ctx.device
        if launched.micro_steps != 1:
            raise InputError(
                f"training.gradient_accumulation_steps: found {launched.micro_steps} micro-batches, expected 1"
            )

        # Data
        check_image_keys(config)
        train_set, provenance = launched.open_data(lambda: open_training_images(config))
        validation_set = ctx.rank0_first(lambda: open_center_crops(config))

        # Networks and optimizers
        torch.manual_seed(training.seed)
        tokenizer = build_trainable_tokenizer(config.model.vq_model)
        if vq_training.init_from is not None:
            tokenizer.load_weights(local_file(vq_training.init_from))
        tokenizer.to(device)
        ema = MovingAverage(tokenizer, training.ema_decay) if training.use_ema else None
        evaluated = ema.module if ema else tokenizer  # held-out metrics and exported weights are the EMA's
        features = PerceptualFeatures().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizers = build_optimizers(tokenizer, config)
        launched.notes.append(describe_optimizers(optimizers))
        discriminator = FeatureDiscriminator(features.feature_channels).to(device)
        discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), betas=(0.5, 0.99))
        usage = CodeUsage(tokenizer.codebook_size).to(device)

        run = TrainingRun(
            launched,
            provenance,
            num_samples=len(train_set),
            modules={
                "model": tokenizer,
                "discriminator": discriminator,
                "code_usage": usage,
                **({"ema": ema.module} if ema else {}),
            },
            optimizers={
                **{name: (tokenizer, optimizer) for name, optimizer in optimizers.items()},
                "discriminator_optimizer": (discriminator, discriminator_optimizer),
            },
            memory_hint="a smaller training.per_gpu_batch_size",
        )
        with run.begin():
            batches = TrainingBatches(
                train_set,
                config,
                ctx,
                micro_steps=launched.micro_steps,
                steps=run.remaining,
                samples_seen=run.state.samples_seen,
                stop_requested=run.stop_requested,
            )

            # The training loop
            for step in run.steps():
                lr = set_learning_rate(optimizers, step, config)
                torch.manual_seed(dropout_seed(training.seed, step, 0, rank=0))  # for the features drawn below
                images = run.next_batch(batches)["image"]
                if step == 0 and vq_training.init_from is None:
                    initialize(tokenizer, usage, images, train_set, config, ctx)
                    if ema:
                        ema.module.load_state_dict(tokenizer.state_dict())
                terms, codes = training_step(tokenizer, features, discriminator, images, config, step=step)
                terms["train/loss"].backward()
                average_gradients(tokenizer, ctx)
                grad_norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), training.max_grad_norm)
                is_finite = run.update_is_finite([terms["train/loss"].detach(), grad_norm])
                if is_finite:
                    for optimizer in optimizers.values():
                        optimizer.step()
                    if ema:
                        ema.update(tokenizer, age=step - run.state.ema_start)
                    run.add_metrics([{name: value.detach() for name, value in terms.items()}], grad_norm)
                tokenizer.zero_grad(set_to_none=True)
                if "train/discriminator" in terms:
                    discriminator_optimizer.zero_grad(set_to_none=True)  # removes gradients of the generator's loss
                    terms["train/discriminator"].backward()
                    average_gradients(discriminator, ctx)
                    if is_finite:
                        discriminator_optimizer.step()
                usage.count(codes, ctx)
                run.end_step()

                if run.triggers.log:
                    run.log_interval({"train/lr": lr})
                if run.triggers.every(vq_training.revive_every) and not run.triggers.is_last:
                    revived = usage.revive(tokenizer, images, ctx)
                    if ema:
                        ema.module.set_vectors(revived, tokenizer.codebook_lookup(revived[None])[0])
                    run.log({"train/revived_codes": len(revived)})
                if run.triggers.every(config.experiment.save_every) or run.triggers.is_last:
                    with run.pause():
                        run.log(
                            ctx.broadcast_from_rank0(lambda: report(evaluated, train_set, validation_set, config, run))
                        )
                        run.draw_curves()
                if run.triggers.save:
                    run.save()
            run.finish()
    return run.status


def check_image_keys(config: Config) -> None:
    """
    Raises:
        InputError: images of a different size than the tokenizer's, or none.
    """
    params, crop_size = config.dataset.params, config.dataset.preprocessing.crop_size
    resolution = config.model.vq_model.resolution
    if crop_size != resolution:
        raise InputError(
            f"dataset.preprocessing.crop_size={crop_size}: expected model.vq_model.resolution={resolution}"
        )
    for name in ("train_shards_path_or_url", "eval_shards_path_or_url"):
        if getattr(params, name) is None:
            raise InputError(f"dataset.params.{name}: missing; give tar shards or a folder per class")


def open_training_images(config: Config) -> ImageDataset:
    """Open the training images, cropped and flipped as the config says."""
    params, preprocessing = config.dataset.params, config.dataset.preprocessing
    assert params.train_shards_path_or_url is not None  # `check_image_keys`
    source = open_images(
        params.train_shards_path_or_url, decoding=ImageDecoding.of(preprocessing), cache=ShardCache.of(params)
    )
    return ImageDataset(source, training_transform(preprocessing), config.training.seed, allowed_bad_fraction(params))


def training_step(
    tokenizer: TrainableTokenizer,
    features: PerceptualFeatures,
    discriminator: FeatureDiscriminator,
    images: Tensor,
    config: TrainTokenizerConfig,
    *,
    step: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Loss terms (scalars) and codes (B, N) of images (B, 3, H, W); the discriminator has a loss of its own."""
    vq_training = config.vq_training
    with autocast(config.training, images.device):
        reconstructions, quantized = tokenizer(images)
    reconstructions = reconstructions.float()
    has_features = (
        max(vq_training.perceptual_weight, vq_training.adversarial_weight) > 0 and step >= vq_training.perceptual_start
    )
    if has_features:  # they are most of the work on a CPU
        count = math.ceil(vq_training.perceptual_fraction * len(images))
        with torch.no_grad():
            image_maps = features(images[:count])
        maps = features(reconstructions[:count])
    terms = {
        "train/l1": F.l1_loss(reconstructions, images),
        "train/mse": F.mse_loss(reconstructions, images),
        "train/commitment": quantized.commitment_loss,
    }
    loss = terms["train/l1"] + vq_training.l2_weight * terms["train/mse"]
    if has_features:
        terms["train/perceptual"] = perceptual_distance(maps, image_maps)
        loss = loss + vq_training.perceptual_weight * terms["train/perceptual"]
    loss = loss + quantized.codebook_loss + vq_training.commitment_weight * quantized.commitment_loss
    if vq_training.color_weight > 0:
        terms["train/color"] = F.l1_loss(color_of(reconstructions), color_of(images))
        loss = loss + vq_training.color_weight * terms["train/color"]
    if vq_training.entropy_weight > 0:
        terms["train/code_entropy"] = entropy_loss(quantized.distances())
        loss = loss + vq_training.entropy_weight * terms["train/code_entropy"]
    if has_features and vq_training.adversarial_weight > 0:
        terms["train/generator"] = generator_loss(discriminator(maps))
        loss = loss + vq_training.adversarial_weight * terms["train/generator"]
        judged = discriminator([x.detach() for x in maps])
        terms["train/discriminator"] = discriminator_loss(discriminator(image_maps), judged)
    terms["train/loss"] = loss
    return terms, quantized.codes


def step_seconds(config: TrainTokenizerConfig) -> float:
    """Seconds of a step on this machine, measured on made-up images: the mean over the steps before and after
    `vq_training.perceptual_start`."""
    take, early = made_up_step(config), early_fraction(config)
    return early * median_seconds(lambda: take(0)) + (1 - early) * median_seconds(
        lambda: take(config.vq_training.perceptual_start)
    )


def early_fraction(config: TrainTokenizerConfig) -> float:
    """Fraction of the steps that come before `vq_training.perceptual_start`."""
    return min(1.0, config.vq_training.perceptual_start / max(1, config.training.max_train_steps))


def made_up_step(config: TrainTokenizerConfig) -> Callable[[int], None]:
    """Take a training step, given its number, on made-up images; for measuring its duration."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = build_trainable_tokenizer(config.model.vq_model).to(device)
    features = PerceptualFeatures().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    discriminator = FeatureDiscriminator(features.feature_channels).to(device)
    optimizers = build_optimizers(tokenizer, config)
    resolution = config.model.vq_model.resolution
    images = torch.rand(config.training.per_gpu_batch_size, 3, resolution, resolution, device=device)

    def take(step: int) -> None:
        terms, _ = training_step(tokenizer, features, discriminator, images, config, step=step)
        terms["train/loss"].backward()
        for optimizer in optimizers.values():
            optimizer.step()
        tokenizer.zero_grad(set_to_none=True)

    return take


def color_of(images: Tensor) -> Tensor:
    """The difference of images (B, 3, H, W) to their grey (mean of the channels)."""
    return images - images.mean(dim=1, keepdim=True)


def initialize(
    tokenizer: TrainableTokenizer,
    usage: "CodeUsage",
    images: Tensor,
    train_set: ImageDataset,
    config: TrainTokenizerConfig,
    ctx: DistributedContext,
) -> None:
    """Set the codebook, and what `init_from_images` sets, before the first step, whose images are (B, 3, H, W)."""
    all_codes = torch.arange(tokenizer.codebook_size, device=images.device)
    if config.vq_training.codebook_init == "latents":
        usage.replace(tokenizer, all_codes, images, ctx)
        return

    def initialized() -> dict[str, Tensor]:
        many = first_images(train_set, config, images.device)
        tokenizer.init_from_images(many)
        with torch.no_grad():
            latents = torch.cat([tokenizer.encode_latents(batch) for batch in many.split(len(images))])
        vectors = k_means(latents.flatten(0, 1), tokenizer.codebook_size, config.training.seed)
        tokenizer.set_vectors(all_codes, vectors)
        return {name: value.cpu() for name, value in tokenizer.state_dict().items()}

    tokenizer.load_state_dict(ctx.broadcast_from_rank0(initialized))


def first_images(train_set: ImageDataset, config: Config, device: torch.device) -> Tensor:
    """Training images (n, 3, H, W) in [0, 1], chosen by the seed: enough for a k-means of their patches."""
    count = min(len(train_set), max(MIN_INIT_IMAGES, INIT_PIXELS // config.model.vq_model.resolution**2))
    indices = permutation_of_pass(len(train_set), seed=config.training.seed, dataset_pass=0)[:count].tolist()
    return on_device(next(Batches(train_set, [indices], num_workers=0)), device)["image"]


class CodeUsage(nn.Module):
    """How often each code was used since the last revival. A module, so that checkpoints hold it."""

    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64))

    def count(self, codes: Tensor, ctx: DistributedContext) -> None:
        """Add codes (B, N) of each process."""
        self.counts += ctx.all_reduce_sum(torch.bincount(codes.flatten(), minlength=len(self.counts)))

    def revive(self, tokenizer: TrainableTokenizer, images: Tensor, ctx: DistributedContext) -> Tensor:
        """Replace the codes (K,) that were not used, and return them."""
        unused = (self.counts == 0).nonzero()[:, 0]
        self.replace(tokenizer, unused, images, ctx)
        self.counts.zero_()
        return unused

    @staticmethod
    @torch.no_grad()
    def replace(tokenizer: TrainableTokenizer, codes: Tensor, images: Tensor, ctx: DistributedContext) -> None:
        """Set the vectors of some codes (K,) to features drawn from images (B, 3, H, W) of rank 0, on all ranks."""
        features = tokenizer.encode_latents(images).flatten(0, 1)  # (B N, Z)
        rows = torch.randint(len(features), (len(codes),), device=features.device)
        drawn = features[rows].contiguous()  # for NCCL
        tokenizer.set_vectors(codes, ctx.all_reduce_sum(drawn if ctx.is_rank0 else torch.zeros_like(drawn)))


def average_gradients(module: nn.Module, ctx: DistributedContext) -> None:
    """Average the gradients over all processes, in place. Not DDP: the discriminator runs several times before
    its backward pass."""
    if ctx.size == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    mean = ctx.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / ctx.size
    for gradient, values in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(values.view_as(gradient))


def report(
    tokenizer: TrainableTokenizer,
    train_set: ImageDataset,
    validation_set: ImageDataset,
    config: TrainTokenizerConfig,
    run: TrainingRun,
) -> dict[str, float]:
    """Write the weights and, for the validation images, metrics and pictures; returns the metrics for the log. On a
    full disk, only the last report ends the run."""
    step, folder = run.state.global_step, run.output_dir
    # float16 is half the size; `load_tokenizer` reads it back as float32
    weights = {key: value.half() for key, value in tokenizer.state_dict().items()}
    rounded = deepcopy(tokenizer)
    rounded.load_state_dict(weights)
    originals, reconstructions, metrics = evaluate(rounded, validation_set, config)
    grid = picture(originals, reconstructions, range(GRID_ROWS * GRID_COLUMNS))
    worst = picture(originals, reconstructions, worst_first(originals, reconstructions, NUM_WORST))
    report: dict[str, Any] = {"step": step, **metrics}
    if run.triggers.is_last:
        metrics |= comparisons(rounded, train_set, validation_set, originals, reconstructions, config)
        lines = verdict(
            metrics,
            num_tokens=rounded.image_seq_len,
            more_tokens=tokens_of_finer_grid(rounded),
            codebook_size=rounded.codebook_size,
            steps=step,
        )
        report |= {**metrics, "verdict": lines}
        for line in lines:
            run.note(line)
    with nullcontext() if run.triggers.is_last else log_and_continue(run.logger, f"weights and metrics of step {step}"):
        save_weights(weights, folder / "tokenizer.safetensors", run.record())
        write_text(folder / "metrics.json", json.dumps(report, indent=1) + "\n")
        write_png(folder / "reconstructions.png", grid)
        write_png(folder / "worst.png", worst)
    run.log_image("reconstructions", grid)
    run.note(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return {f"heldout/{name}": value for name, value in metrics.items()}


def tokens_of_finer_grid(tokenizer: TrainableTokenizer) -> int | None:
    """Tokens per image if each covered half as many pixels in both directions; None if that is impossible."""
    shape = tokenizer.code_shape
    return 4 * tokenizer.image_seq_len if len(shape) == 2 and tokenizer.resolution % (2 * shape[0]) == 0 else None


@torch.inference_mode()
def evaluate(
    tokenizer: TrainableTokenizer, validation_set: ImageDataset, config: Config
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """At most `MAX_EVALUATED` validation images and their reconstructions, (n, H, W, 3) uint8, in an order that shows
    several classes, and metrics of them."""
    device = next(tokenizer.parameters()).device
    metrics = ReconstructionMetrics(tokenizer.codebook_size)
    originals, reconstructed = [], []
    for batch in heldout_batches(validation_set):
        validation_set.skipped.add(batch["index"], batch["skipped"])
        batch = on_device(batch, device)
        images = batch["image"][~batch["skipped"]]
        codes = tokenizer.encode(images)
        reconstructions = tokenizer.decode(codes)
        metrics.update(images, reconstructions, codes)
        originals.append(to_uint8(images, "round"))
        reconstructed.append(to_uint8(reconstructions, config.sampling.uint8_rule))
    return np.concatenate(originals), np.concatenate(reconstructed), metrics.summary()


def heldout_batches(validation_set: ImageDataset) -> Batches:
    order = permutation_of_pass(len(validation_set), seed=0, dataset_pass=0)[:MAX_EVALUATED].tolist()
    items = [order[i : i + GRID_COLUMNS] for i in range(0, len(order), GRID_COLUMNS)]
    return Batches(validation_set, items, num_workers=0)


def comparisons(
    tokenizer: TrainableTokenizer,
    train_set: ImageDataset,
    validation_set: ImageDataset,
    originals: np.ndarray,
    reconstructions: np.ndarray,
    config: Config,
) -> dict[str, float]:
    """`reconstruction_distance`, if there are two images, and, for a grid of tokens, the metrics `COMPARED` of k-means
    of raw patches with as many tokens and codebook entries, each with the prefix `patch_`."""
    device = next(tokenizer.parameters()).device
    found = {}
    if len(originals) > 1:
        found["reconstruction_distance"] = distance_of_reconstructions(
            originals[:MAX_COMPARED], reconstructions[:MAX_COMPARED], device
        )
    shape = tokenizer.code_shape
    if len(shape) == 2 and tokenizer.resolution % shape[0] == 0:
        training_images = first_images(train_set, config, device)
        baseline = PatchBaseline(training_images, grid_size=shape[0], codebook_size=tokenizer.codebook_size)
        metrics = ReconstructionMetrics(tokenizer.codebook_size)
        for batch in heldout_batches(validation_set):
            images = on_device(batch, device)["image"][~batch["skipped"].to(device)]
            metrics.update(images, *baseline.reconstruct(images))
        of_patches = metrics.summary()
        found |= {f"patch_{name}": of_patches[name] for name in COMPARED}
    return found


def picture(originals: np.ndarray, reconstructions: np.ndarray, indices: Iterable[int]) -> Image.Image:
    """Rows of some images, each above its row of reconstructions; without a last row that is not full."""
    shown = [i for i in indices if i < len(originals)]
    columns = min(GRID_COLUMNS, len(shown))
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    full = [row for row in rows if len(row) == columns]
    return make_grid(np.concatenate([of[row] for row in full for of in (originals, reconstructions)]), columns)


if __name__ == "__main__":
    with input_errors_exit():
        raise SystemExit(EXIT_STATUS[main(CONFIG)])
