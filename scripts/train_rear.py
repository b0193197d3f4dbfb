"""Train reAR, or the plain AR baseline, on tokenizer codes.

    PYTHONPATH=. accelerate launch --multi_gpu --num_processes 8 scripts/train_rear.py \\
        config=configs/rear_b.yaml experiment.output_dir=outputs/rear_b

Reads pre-tokenized codes (`dataset.params.pretokenization`) or images, which it tokenizes on the fly
(`dataset.params.train_shards_path_or_url`). The plain AR baseline is `model.generator.perturb_mode=none
model.generator.transition_alignment=false`. The same command again continues the run.

Writes to `experiment.output_dir`: config.yaml, environment.txt, log.txt, metrics.jsonl, checkpoint-<step>/,
train_generated_images/<step>.png, training_curves.png and, at the end, model.safetensors (the EMA if there is one).
"""

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    from utils.config import check_tokenizer_fits, load_config_or_exit

    CONFIG = load_config_or_exit(check_tokenizer_fits)

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.batch_sampler import GlobalBatchSampler
from data.images import ImageDataset, open_images
from data.token_store import open_tokens
from data.transforms import training_transform
from modeling.generate import generate_images
from modeling.losses import LossTerms, drop_class_labels, perturb_codes, rear_loss
from modeling.maskgit_vq import MaskGitVQ, load_tokenizer
from modeling.rear import ReAR
from utils.checkpoint import TrainingState, find_checkpoint, load_checkpoint, save_checkpoint, save_weights
from utils.config import Config
from utils.errors import InputError, input_errors_exit
from utils.images import make_grid
from utils.optim import build_optimizer, set_learning_rate
from utils.plots import save_training_curves
from utils.randomness import dropout_seed, sample_uniforms
from utils.run_folder import make_logger, prepare_run_folder
from utils.schedules import perturbation_ratio_at
from utils.tracking import Tracker

GRID_CLASSES, GRID_ROWS = 10, 4


def main(config: Config) -> None:
    training, output_dir, keep_last = config.training, Path(config.experiment.output_dir), config.experiment.keep_last
    resume_from = find_checkpoint(output_dir, config.experiment.resume)
    tokenizer = load_tokenizer(config)
    accelerator = Accelerator(mixed_precision=training.mixed_precision, cpu=not torch.cuda.is_available())
    if accelerator.is_main_process:
        prepare_run_folder(config)
    accelerator.wait_for_everyone()
    logger = make_logger(output_dir, accelerator.is_main_process)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.enable_tf32

    # Model, optimizer, EMA
    torch.manual_seed(training.seed)
    tokenizer.to(accelerator.device)
    model = ReAR(config.model).to(accelerator.device)
    optimizer = build_optimizer(model, config)
    ema_updater = ModelEmaV3(model, decay=training.ema_decay) if training.use_ema else None
    ema = ema_updater.module if ema_updater else None
    sampling_model = ema or model

    # Resume
    micro_steps = training.gradient_accumulation_steps
    global_batch_size = training.per_gpu_batch_size * micro_steps * accelerator.num_processes
    first_step = 0
    if resume_from is not None:
        state = load_checkpoint(resume_from, model, optimizer, ema)
        if state.global_batch_size != global_batch_size:
            raise InputError(
                f"{resume_from}: written at a global batch of {state.global_batch_size} images, found "
                f"{global_batch_size} = per_gpu_batch_size * gradient_accumulation_steps * processes; keep the product"
            )
        first_step = state.global_step
    last_step = training.max_train_steps if training.stop_steps is None else training.stop_steps

    # Data: the sampler alone decides which rank sees which sample at which step
    with accelerator.main_process_first():
        dataset = open_training_data(config)
    batch_sampler = GlobalBatchSampler(
        num_samples=len(dataset),
        per_gpu_batch_size=training.per_gpu_batch_size,
        gradient_accumulation_steps=micro_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=training.seed,
        first_step=first_step,
        last_step=last_step,
    )
    batches = training_batches(dataset, batch_sampler, config, accelerator.device)
    wrapped_model, optimizer = accelerator.prepare(model, optimizer)
    tracker = Tracker(config, output_dir, first_step) if accelerator.is_main_process else None
    logger.info(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(dataset)} samples, "
        f"{global_batch_size} per step on {accelerator.num_processes} processes, steps {first_step} to {last_step}"
    )

    # The training loop
    wrapped_model.train()
    uniforms_per_sample = 2 * model.image_seq_len + 2
    progress = tqdm(
        range(first_step, last_step), initial=first_step, total=last_step, disable=not accelerator.is_main_process
    )
    timer, timed_from = time.perf_counter(), first_step
    for step in progress:
        lr = set_learning_rate(optimizer, step, config)
        max_ratio = perturbation_ratio(step, config)
        step_terms = []
        for micro_step in range(micro_steps):
            batch = next(batches)
            first = accelerator.process_index * training.per_gpu_batch_size * micro_steps
            first += micro_step * training.per_gpu_batch_size  # position of this micro-batch in the global batch
            uniforms = sample_uniforms(training.seed, step, first, training.per_gpu_batch_size, uniforms_per_sample)
            torch.manual_seed(dropout_seed(training.seed, step, micro_step, accelerator.process_index))
            is_last = micro_step == micro_steps - 1
            with nullcontext() if is_last else accelerator.no_sync(wrapped_model):  # one all-reduce per step
                terms = training_step(wrapped_model, tokenizer, batch, uniforms, max_ratio, config)
                accelerator.backward(terms.loss / micro_steps)
            step_terms.append(terms)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema_updater:
            ema_updater.update(model)

        done = step + 1
        if done == 1 or done % config.experiment.log_every == 0:
            metrics = mean_over_ranks(step_terms, accelerator)
            metrics |= {"lr": lr, "perturbation_ratio": max_ratio}
            metrics["epoch"] = done * global_batch_size / config.experiment.max_train_examples
            now = time.perf_counter()
            samples = (done - timed_from) * global_batch_size / accelerator.num_processes
            metrics["samples/sec/gpu"], timer, timed_from = samples / (now - timer), now, done
            if done == 1 or done % config.experiment.log_grad_norm_every == 0:
                metrics["grad_norm"] = float(grad_norm)
            if tracker:
                tracker.log(metrics, done)
            progress.set_postfix(loss=f"{metrics['train/loss']:.3f}", ar=f"{metrics['train/ar_loss']:.3f}")
        if done % config.experiment.save_every == 0 and done < last_step:
            if accelerator.is_main_process:
                save_checkpoint(output_dir, TrainingState(done, global_batch_size), model, optimizer, ema, keep_last)
            accelerator.wait_for_everyone()
        if tracker and (done % config.experiment.generate_every == 0 or done == last_step):
            tracker.log_image("samples", save_sample_grid(sampling_model, tokenizer, config, done), done)

    if accelerator.is_main_process:
        save_checkpoint(output_dir, TrainingState(last_step, global_batch_size), model, optimizer, ema, keep_last)
        save_weights(sampling_model.state_dict(), output_dir / "model.safetensors")
        save_training_curves(output_dir / "metrics.jsonl", output_dir / "training_curves.png")
        tracker.finish()
        logger.info(f"done at step {last_step}: {output_dir / 'model.safetensors'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def training_step(
    model: torch.nn.Module,
    tokenizer: MaskGitVQ,
    batch: dict[str, Tensor],
    uniforms: Tensor,
    max_ratio: float,
    config: Config,
) -> LossTerms:
    """Noise the context, run the model, compute the loss: one micro-batch of B images.

    Args:
        batch: `class_labels` (B,) and `codes` (B, N) or `image` (B, 3, H, W), on the model's device.
        uniforms: (B, 2 N + 2) random numbers of these samples at this step.
        max_ratio: f(t), largest share of replaced codes.
    """
    generator = config.model.generator
    codes = batch["codes"] if "codes" in batch else tokenizer.encode(batch["image"])  # (B, N)
    uniforms = uniforms.to(codes.device)
    codebook_size = config.model.vq_model.codebook_size
    mask_code = codebook_size if generator.perturb_mode == "mask" else None
    context, perturbation_mask = perturb_codes(codes, uniforms[:, 1:], max_ratio, codebook_size, mask_code)
    class_labels = drop_class_labels(
        batch["class_labels"], uniforms[:, 0], generator.class_label_dropout, generator.condition_num_classes
    )
    output = model(context, class_labels)
    return rear_loss(output, codes, tokenizer.embed(codes), perturbation_mask, generator)


def perturbation_ratio(step: int, config: Config) -> float:
    generator = config.model.generator
    if generator.perturb_mode == "none":
        return 0.0
    return perturbation_ratio_at(step, generator.randomness_anneal_start, generator.randomness_anneal_end)


def open_training_data(config: Config) -> Dataset:
    """Codes if the config names some, else images."""
    params, model = config.dataset.params, config.model
    if params.pretokenization is not None:
        generator = model.generator
        return open_tokens(
            Path(params.pretokenization),
            model.vq_model.codebook_size,
            generator.image_seq_len,
            generator.condition_num_classes,
        )
    if params.train_shards_path_or_url is None:
        raise InputError("dataset.params: give pretokenization (codes) or train_shards_path_or_url (images)")
    return ImageDataset(
        open_images(params.train_shards_path_or_url, model.generator.condition_num_classes),
        training_transform(config.dataset.preprocessing),
        config.training.seed,
    )


def training_batches(
    dataset: Dataset, batch_sampler: GlobalBatchSampler, config: Config, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    loader = DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=config.dataset.params.num_workers_per_gpu,
        collate_fn=dataset.collate,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        yield send_to_device(batch, device, non_blocking=True)


def mean_over_ranks(step_terms: list[LossTerms], accelerator: Accelerator) -> dict[str, float]:
    """Mean of the loss terms over the micro-batches and ranks of one step: one all-reduce, one host sync."""
    names = ["loss", "ar_loss", "proj_loss", "correct_tokens"]
    values = torch.stack([torch.stack([getattr(terms, name).detach() for name in names]) for terms in step_terms])
    means = accelerator.reduce(values.mean(dim=0), reduction="mean").tolist()
    return {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}


def save_sample_grid(model: ReAR, tokenizer: MaskGitVQ, config: Config, step: int) -> Image.Image:
    """A column of samples for each of the first classes; always the same classes and random numbers."""
    columns = min(GRID_CLASSES, model.num_classes)
    indices = [row * model.num_classes + label for row in range(GRID_ROWS) for label in range(columns)]
    was_training = model.training
    grid = make_grid(generate_images(model.eval(), tokenizer, indices, config), columns)
    model.train(was_training)
    folder = Path(config.experiment.output_dir) / "train_generated_images"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"{step:07d}.png")
    return grid


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
