"""Train a tokenizer with a codebook on images: reconstruction, vector-quantization, perceptual and, for
`vq_training.adversarial_weight` > 0, adversarial losses.

    OMP_WAIT_POLICY=PASSIVE python scripts/train_tokenizer.py config=configs/tokenizer_blue_marble.yaml

Reads `dataset.params.train_shards_path_or_url` and, for validation, `eval_shards_path_or_url`. Rerun the same command
to resume, as in train_rear.py; `vq_training.init_from` starts a new run from weights. With
`torchrun --nproc_per_node=8` instead of `python`, eight processes share a step.

Writes to `experiment.output_dir`: config.yaml, environment.txt, log.txt, metrics.jsonl, status.json,
checkpoint-<step>/, training_curves.png and, every `experiment.save_every` steps and at the end, tokenizer.safetensors
(float16), metrics.json (validation metrics) and reconstructions.png (originals above reconstructions). The exit
status is 75 after a stop signal.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import load_config_or_exit
from utils.config_checks import check_schedules
from utils.keys import NonNegativeFloat, PositiveInt, key, section
from utils.schema import Config

READS = {
    "experiment": "all but max_train_examples generate_every eval_every eval_samples save_weights_every init_from "
    "tokenizer_checkpoint generator_checkpoint",
    "model.vq_model": "all",
    "dataset.params": "all but pretokenization eval_pretokenization verify_hashes",
    "dataset.preprocessing": "all but pretokenize_crops",
    "optimizer": "all",
    "lr_scheduler": "all",
    "training": "all but use_ema ema_decay fsdp compile",
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
    perceptual_weight: NonNegativeFloat = key(0.1, "weight of the distance between EfficientNet-Lite0 features")
    adversarial_weight: NonNegativeFloat = key(0.0, "weight of the discriminator on the same features; 0: none")
    revive_every: PositiveInt = key(100, "steps between replacements of the codebook vectors unused since the last one")


@dataclass
class TrainTokenizerConfig(Config):
    vq_training: VQTrainingConfig = section(VQTrainingConfig)


if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(TrainTokenizerConfig, __doc__, READS, check=check_schedules)

import json
from contextlib import nullcontext
from copy import deepcopy

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
from evaluation.reconstruction import ReconstructionMetrics
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
from utils.optim import build_optimizers, describe_optimizers, set_learning_rate
from utils.precision import autocast
from utils.randomness import dropout_seed
from utils.run.launch import launch
from utils.run.run_environment import log_and_continue
from utils.run.status import EXIT_STATUS
from utils.run.training_run import TrainingRun

GRID_COLUMNS, GRID_ROWS = 16, 4  # a row of originals and the row of their reconstructions count as one


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
            modules={"model": tokenizer, "discriminator": discriminator, "code_usage": usage},
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
                    usage.replace(tokenizer, torch.arange(tokenizer.codebook_size, device=device), images, ctx)
                terms, codes = training_step(tokenizer, features, discriminator, images, config)
                terms["train/loss"].backward()
                average_gradients(tokenizer, ctx)
                grad_norm = torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), training.max_grad_norm)
                is_finite = run.update_is_finite([terms["train/loss"].detach(), grad_norm])
                if is_finite:
                    for optimizer in optimizers.values():
                        optimizer.step()
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
                    run.log({"train/revived_codes": usage.revive(tokenizer, images, ctx)})
                if run.triggers.every(config.experiment.save_every) or run.triggers.is_last:
                    with run.pause():
                        run.log(ctx.broadcast_from_rank0(lambda: report(tokenizer, validation_set, config, run)))
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
) -> tuple[dict[str, Tensor], Tensor]:
    """Loss terms (scalars) and codes (B, N) of images (B, 3, H, W); the discriminator has a loss of its own."""
    vq_training = config.vq_training
    with autocast(config.training, images.device):
        reconstructions, quantized = tokenizer(images)
    reconstructions = reconstructions.float()
    with torch.no_grad():
        image_maps = features(images)
    maps = features(reconstructions)
    terms = {
        "train/l1": F.l1_loss(reconstructions, images),
        "train/mse": F.mse_loss(reconstructions, images),
        "train/perceptual": perceptual_distance(maps, image_maps),
        "train/commitment": quantized.commitment_loss,
    }
    terms["train/loss"] = (
        terms["train/l1"]
        + vq_training.l2_weight * terms["train/mse"]
        + vq_training.perceptual_weight * terms["train/perceptual"]
        + quantized.codebook_loss
        + vq_training.commitment_weight * quantized.commitment_loss
    )
    if vq_training.entropy_weight > 0:
        terms["train/code_entropy"] = entropy_loss(quantized.distances())
        terms["train/loss"] = terms["train/loss"] + vq_training.entropy_weight * terms["train/code_entropy"]
    if vq_training.adversarial_weight > 0:
        terms["train/generator"] = generator_loss(discriminator(maps))
        terms["train/loss"] = terms["train/loss"] + vq_training.adversarial_weight * terms["train/generator"]
        judged = discriminator([x.detach() for x in maps])
        terms["train/discriminator"] = discriminator_loss(discriminator(image_maps), judged)
    return terms, quantized.codes


class CodeUsage(nn.Module):
    """How often each code was used since the last revival. A module, so that checkpoints hold it."""

    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64))

    def count(self, codes: Tensor, ctx: DistributedContext) -> None:
        """Add codes (B, N) of each process."""
        self.counts += ctx.all_reduce_sum(torch.bincount(codes.flatten(), minlength=len(self.counts)))

    def revive(self, tokenizer: TrainableTokenizer, images: Tensor, ctx: DistributedContext) -> int:
        """Replace the codes that were not used. Returns their number."""
        unused = (self.counts == 0).nonzero()[:, 0]
        self.replace(tokenizer, unused, images, ctx)
        self.counts.zero_()
        return len(unused)

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
    tokenizer: TrainableTokenizer, validation_set: ImageDataset, config: Config, run: TrainingRun
) -> dict[str, float]:
    """Write the weights and, for the validation images, metrics and a grid; returns the metrics for the log. On a full
    disk, only the last report ends the run."""
    step, folder = run.state.global_step, run.output_dir
    # float16 is half the size; `load_tokenizer` reads it back as float32
    weights = {key: value.half() for key, value in tokenizer.state_dict().items()}
    rounded = deepcopy(tokenizer)
    rounded.load_state_dict(weights)
    metrics, grid = evaluate(rounded, validation_set, config)
    with nullcontext() if run.triggers.is_last else log_and_continue(run.logger, f"weights and metrics of step {step}"):
        save_weights(weights, folder / "tokenizer.safetensors", run.record())
        write_text(folder / "metrics.json", json.dumps({"step": step, **metrics}, indent=1) + "\n")
        write_png(folder / "reconstructions.png", grid)
    run.log_image("reconstructions", grid)
    run.note(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return {f"heldout/{name}": value for name, value in metrics.items()}


@torch.inference_mode()
def evaluate(
    tokenizer: TrainableTokenizer, validation_set: ImageDataset, config: Config
) -> tuple[dict[str, float], Image.Image]:
    """Validation metrics, and a grid: rows of originals, each above its row of reconstructions."""
    device = next(tokenizer.parameters()).device
    metrics = ReconstructionMetrics(tokenizer.codebook_size)
    order = permutation_of_pass(len(validation_set), seed=0, dataset_pass=0).tolist()  # the grid shows several classes
    columns = min(GRID_COLUMNS, len(validation_set))
    shown: list[np.ndarray] = []
    for batch in Batches(
        validation_set, [order[i : i + columns] for i in range(0, len(order), columns)], num_workers=0
    ):
        validation_set.skipped.add(batch["index"], batch["skipped"])
        batch = on_device(batch, device)
        images, is_good = batch["image"], ~batch["skipped"]
        codes = tokenizer.encode(images)
        reconstructions = tokenizer.decode(codes)
        metrics.update(images[is_good], reconstructions[is_good], codes[is_good])
        if len(shown) < 2 * GRID_ROWS and len(images) == columns:
            shown += [to_uint8(images), to_uint8(reconstructions, config.sampling.uint8_rule)]
    return metrics.summary(), make_grid(np.concatenate(shown), columns)


if __name__ == "__main__":
    with input_errors_exit():
        raise SystemExit(EXIT_STATUS[main(CONFIG)])
