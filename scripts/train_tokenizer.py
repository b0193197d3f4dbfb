"""Train a MaskGIT-VQ tokenizer on images, one process: reconstruction, vector-quantization, perceptual and, for
`vq_training.adversarial_weight` > 0, adversarial losses.

    OMP_WAIT_POLICY=PASSIVE python scripts/train_tokenizer.py config=configs/tokenizer_blue_marble.yaml

Reads `dataset.params.train_shards_path_or_url` and, for the held-out figures, `eval_shards_path_or_url`. There is
no resuming: a new start replaces an earlier run in the same folder. `vq_training.init_from` goes on from weights.

Writes to `experiment.output_dir`: config.yaml, environment.txt, log.txt, metrics.jsonl and, every
`experiment.save_every` steps and at the end, tokenizer.safetensors (float16), metrics.json (held-out figures) and
reconstructions.png (held-out originals above reconstructions).
"""

import sys
from pathlib import Path

READS = (
    *("experiment.project", "experiment.name", "experiment.entity", "experiment.output_dir", "experiment.save_every"),
    *("experiment.log_every", "model.vq_model", "dataset.params.train_shards_path_or_url"),
    *("dataset.params.eval_shards_path_or_url", "dataset.params.num_workers_per_gpu", "dataset.preprocessing"),
    *("-dataset.preprocessing.pretokenize_crops", "optimizer", "lr_scheduler", "training.per_gpu_batch_size"),
    *("training.mixed_precision", "training.enable_tf32", "training.enable_wandb", "training.seed"),
    *("training.max_train_steps", "training.max_grad_norm", "vq_training", "sampling.uint8_rule"),
)

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory
    from utils.config import load_config_or_exit

    CONFIG = load_config_or_exit(__doc__, READS)

import json
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.batch_sampler import GlobalBatchSampler, permutation
from data.images.reading import ImageDataset, open_images
from data.images.transforms import training_transform
from evaluation.reconstruction import ReconstructionMetrics
from modeling.tokenizers.discriminator import FeatureDiscriminator, discriminator_loss, generator_loss
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from modeling.tokenizers.perceptual import PerceptualFeatures, perceptual_distance
from utils.config import Config
from utils.errors import InputError, input_errors_exit
from utils.files.hub import local_file
from utils.files.weights import load_state_dict, load_strict
from utils.images import make_grid, to_uint8
from utils.optim import build_optimizer, set_learning_rate
from utils.run.checkpoint import save_weights
from utils.run.folder import make_logger, prepare_run_folder
from utils.run.tracking import Tracker

GRID_COLUMNS, GRID_ROWS = 16, 4  # a row of originals and one of reconstructions count as one


def main(config: Config) -> None:
    training, vq_training = config.training, config.vq_training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.enable_tf32
    train_set, heldout_set = open_datasets(config)
    output_dir = prepare_run_folder(config)
    logger = make_logger(output_dir, is_main_process=True)

    torch.manual_seed(training.seed)
    tokenizer = MaskGitVQ(config.model.vq_model)
    if vq_training.init_from is not None:
        load_strict(tokenizer, load_state_dict(local_file(vq_training.init_from)), vq_training.init_from)
    tokenizer.to(device)
    features = PerceptualFeatures().to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(tokenizer, config)
    discriminator = FeatureDiscriminator(features.feature_channels).to(device)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), betas=(0.5, 0.99))
    tracker = Tracker(config, output_dir, first_step=0)
    logger.info(
        f"{sum(p.numel() for p in tokenizer.parameters()) / 1e6:.2f} M parameters, {len(train_set)} images, "
        f"{len(heldout_set)} held out, {training.max_train_steps} steps of {training.per_gpu_batch_size}"
    )

    uses = torch.zeros(tokenizer.codebook_size, dtype=torch.int64, device=device)  # uses since the last revival
    batches = make_loader(train_set, config)
    for step, batch in enumerate(tqdm(batches, total=training.max_train_steps)):
        lr = set_learning_rate(optimizer, step, config)
        images = batch["image"].to(device)
        if step == 0 and vq_training.init_from is None:
            replace_codes(tokenizer, torch.arange(tokenizer.codebook_size, device=device), images)
        terms, codes = training_step(tokenizer, features, discriminator, images, config)
        terms["train/loss"].backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if "train/discriminator" in terms:
            discriminator_optimizer.zero_grad(set_to_none=True)  # the generator's loss left gradients here too
            terms["train/discriminator"].backward()
            discriminator_optimizer.step()

        done = step + 1
        uses += torch.bincount(codes.flatten(), minlength=tokenizer.codebook_size)
        if done % vq_training.revive_every == 0 and done < training.max_train_steps:
            unused = (uses == 0).nonzero()[:, 0]
            replace_codes(tokenizer, unused, images)
            tracker.log({"revived_codes": len(unused)}, done)
            uses.zero_()
        if done == 1 or done % config.experiment.log_every == 0:
            tracker.log({name: value.item() for name, value in terms.items()} | {"lr": lr}, done)
        if done % config.experiment.save_every == 0 or done == training.max_train_steps:
            export(tokenizer, output_dir / "tokenizer.safetensors")
            metrics, grid = evaluate(tokenizer, heldout_set, config)
            (output_dir / "metrics.json").write_text(json.dumps({"step": done, **metrics}, indent=1) + "\n")
            grid.save(output_dir / "reconstructions.png")
            tracker.log({f"heldout/{name}": value for name, value in metrics.items()}, done)
            tracker.log_image("reconstructions", grid, done)
            logger.info(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    tracker.finish()


def open_datasets(config: Config) -> tuple[ImageDataset, ImageDataset]:
    """Training images as the config says, held-out images with a centre crop and no flip."""
    params, preprocessing, seed = config.dataset.params, config.dataset.preprocessing, config.training.seed
    for name in ("train_shards_path_or_url", "eval_shards_path_or_url"):
        if getattr(params, name) is None:
            raise InputError(f"dataset.params.{name}: missing; give tar shards or a folder per class")
    centre = replace(preprocessing, random_crop=False, random_flip=False)
    return (
        ImageDataset(open_images(params.train_shards_path_or_url), training_transform(preprocessing), seed),
        ImageDataset(open_images(params.eval_shards_path_or_url), training_transform(centre), seed),
    )


def make_loader(dataset: ImageDataset, config: Config) -> DataLoader:
    """Shuffled batches for all training steps."""
    training = config.training
    batch_sampler = GlobalBatchSampler(
        num_samples=len(dataset),
        per_gpu_batch_size=training.per_gpu_batch_size,
        gradient_accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=training.seed,
        first_step=0,
        last_step=training.max_train_steps,
    )
    workers = config.dataset.params.num_workers_per_gpu
    return DataLoader(dataset, batch_sampler=batch_sampler, num_workers=workers, collate_fn=dataset.collate)


def training_step(
    tokenizer: MaskGitVQ,
    features: PerceptualFeatures,
    discriminator: FeatureDiscriminator,
    images: Tensor,
    config: Config,
) -> tuple[dict[str, Tensor], Tensor]:
    """Loss terms (scalars) and codes (B, N) of images (B, 3, H, W); the discriminator has a loss of its own."""
    vq_training = config.vq_training
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.training.mixed_precision == "bf16"):
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
    if vq_training.adversarial_weight > 0:
        terms["train/generator"] = generator_loss(discriminator(maps))
        terms["train/loss"] = terms["train/loss"] + vq_training.adversarial_weight * terms["train/generator"]
        judged = discriminator([x.detach() for x in maps])
        terms["train/discriminator"] = discriminator_loss(discriminator(image_maps), judged)
    return terms, quantized.codes


@torch.no_grad()
def replace_codes(tokenizer: MaskGitVQ, codes: Tensor, images: Tensor) -> None:
    """Set the vectors of some codes (K,) to features drawn from images (B, 3, H, W)."""
    features = tokenizer.encoder(images).movedim(1, -1).flatten(0, 2)  # (B h w, Z)
    drawn = torch.randint(len(features), (len(codes),), device=features.device)
    tokenizer.quantize.embedding.weight[codes] = features[drawn]


def export(tokenizer: MaskGitVQ, path: Path) -> None:
    """Write the weights in float16: half the size, and `load_tokenizer` reads them back as float32."""
    save_weights({key: value.half() for key, value in tokenizer.state_dict().items()}, path)


@torch.inference_mode()
def evaluate(tokenizer: MaskGitVQ, heldout_set: ImageDataset, config: Config) -> tuple[dict[str, float], Image.Image]:
    """Figures over the held-out images, and a grid: rows of originals, each above its row of reconstructions."""
    device = next(tokenizer.parameters()).device
    metrics = ReconstructionMetrics(tokenizer.codebook_size)
    order = permutation(len(heldout_set), seed=0, pass_number=0).tolist()  # mixed classes in the grid
    columns, shown = min(GRID_COLUMNS, len(heldout_set)), []
    for batch in DataLoader(heldout_set, batch_size=GRID_COLUMNS, sampler=order):
        images = batch["image"].to(device)
        codes = tokenizer.encode(images)
        reconstructions = tokenizer.decode(codes)
        metrics.update(images, reconstructions, codes)
        if len(shown) < 2 * GRID_ROWS and len(images) == columns:
            shown += [to_uint8(images), to_uint8(reconstructions, config.sampling.uint8_rule)]
    return metrics.summary(), make_grid(np.concatenate(shown), columns)


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
