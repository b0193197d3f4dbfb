"""Train reAR, or the plain AR baseline, on tokenizer codes.

    accelerate launch --multi_gpu --num_processes 8 scripts/train_rear.py \\
        config=configs/rear_b.yaml experiment.output_dir=outputs/rear_b

Reads pre-tokenized codes (`dataset.params.pretokenization`) or images, which it tokenizes on the fly
(`dataset.params.train_shards_path_or_url`). The plain AR baseline is `model.generator.perturb_mode=none
model.generator.transition_alignment=false`. The same command again continues the run.

Writes to `experiment.output_dir`: config.yaml, environment.txt, log.txt, metrics.jsonl, status.json,
checkpoint-<step>/, train_generated_images/<step>.png, training_curves.png and, when complete, model.safetensors
(the EMA if there is one). The exit status is 75 after a stop signal.
"""

import sys
from pathlib import Path

READS = (
    *("experiment", "-experiment.generator_checkpoint", "model", "optimizer", "lr_scheduler", "training"),
    *("dataset", "-dataset.params.eval_shards_path_or_url", "-dataset.preprocessing.pretokenize_crops"),
    *("sampling.seed", "sampling.uint8_rule"),
)

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory
    from utils.config import load_config_or_exit
    from utils.config_checks import check_training

    CONFIG = load_config_or_exit(__doc__, READS, check_training)

import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm import tqdm

from data.batch_sampler import GlobalBatchSampler
from data.training import TrainingBatches, describe_length, open_training_data, passes_done
from modeling.losses import LossTerms, drop_class_labels, perturb_codes, rear_loss
from modeling.rear import ReAR, init_from
from modeling.sampling.sample_grid import save_sample_grid
from modeling.tokenizers.maskgit_vq import MaskGitVQ, load_tokenizer
from utils.config import Config
from utils.config_checks import accumulation_steps
from utils.errors import TrainingError, input_errors_exit
from utils.files.weights import weights_sha256
from utils.optim import build_optimizer, set_learning_rate
from utils.randomness import dropout_seed, sample_uniforms
from utils.run.checkpoint import load_optimizer, save_weights
from utils.run.compatibility import check_same_run, flatten
from utils.run.curves import save_training_curves
from utils.run.faults import fault_point
from utils.run.folder import code_facts, make_logger, prepare_run_folder
from utils.run.guard import StepGuard, max_over_ranks, sum_over_ranks
from utils.run.launch import Launch
from utils.run.manifest import Provenance
from utils.run.resume import Start, find_start, load_start, set_aside, starting_state
from utils.run.saver import CheckpointSaver
from utils.run.sharding import shard_model, whole
from utils.run.signals import StopSignals
from utils.run.snapshot import take_snapshot
from utils.run.status import EXIT_PREEMPTED, reported_status
from utils.run.tracking import Tracker
from utils.schedules import perturbation_ratio


def main(config: Config) -> str:
    """Train until the last step or a stop signal; returns what `status.json` says then."""
    training, output_dir, resume = config.training, Path(config.experiment.output_dir), config.experiment.resume
    tokenizer = load_tokenizer(config)

    # Launch: all ranks are there and agree; rank 0 converts and verifies files while the others wait
    launch = Launch(training.launch_timeout)
    is_main = launch.rank == 0
    facts = code_facts()
    launch.agree("config and code", flatten(asdict(config)) | facts)
    start = Start(**launch.from_main("checkpoint", lambda: asdict(find_start(output_dir, resume))))
    verify = is_main and config.dataset.params.verify_hashes
    tokenizer_sha256 = weights_sha256(tokenizer)
    dataset = launch.main_first("data", lambda: open_training_data(config, tokenizer_sha256, verify))
    provenance = Provenance(asdict(config), dataset.fingerprint, facts["code"])
    launch.agree("data", {"hash": provenance.data_hash, "samples": len(dataset)})
    micro_steps = accumulation_steps(training, launch.world_size)
    global_batch_size = training.per_gpu_batch_size * micro_steps * launch.world_size
    notices = launch.from_main("resume", lambda: check_same_run(start, config, provenance, global_batch_size))
    launch.leave()
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=training.process_group_timeout))],
    )
    if is_main:
        prepare_run_folder(config)
        set_aside(start)
    accelerator.wait_for_everyone()
    logger = make_logger(output_dir, is_main)
    for notice in [*start.notices, *notices]:
        logger.info(notice)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.enable_tf32

    # Model, optimizer, EMA, from the checkpoint if there is one
    torch.manual_seed(training.seed)
    tokenizer.to(accelerator.device)
    model = ReAR(config.model).to(accelerator.device)
    if start.checkpoint is None and config.experiment.init_from is not None:
        init_from(config.experiment.init_from, model)
        logger.info(f"starting from the weights of {config.experiment.init_from}, with new rows for the classes")
    ema_updater = ModelEmaV3(model, decay=training.ema_decay) if training.use_ema else None
    ema = ema_updater.module if ema_updater else None
    load_start(start, model, ema)
    if training.fsdp:
        shard_model(model, model.blocks)
    optimizer = build_optimizer(model, config)
    wrapped_model = accelerator.prepare_model(model, evaluation_mode=training.fsdp)  # with FSDP autocast alone
    if start.checkpoint is not None and not start.weights_only:
        load_optimizer(Path(start.checkpoint), model, optimizer, training.fsdp)
    state = starting_state(start, resume, global_batch_size)
    first_step = state.global_step
    last_step = training.max_train_steps if training.stop_steps is None else training.stop_steps

    # Data: the sampler alone decides which rank sees which sample at which step
    batch_sampler = GlobalBatchSampler(
        num_samples=len(dataset),
        per_gpu_batch_size=training.per_gpu_batch_size,
        gradient_accumulation_steps=micro_steps,
        rank=launch.rank,
        world_size=launch.world_size,
        seed=training.seed,
        first_step=first_step,
        last_step=last_step,
        samples_seen=state.samples_seen,
    )
    batches = TrainingBatches(dataset, batch_sampler, config, accelerator.device)
    tracker = Tracker(config, output_dir, first_step) if is_main else None
    saver = CheckpointSaver(config.experiment, provenance, start.checkpoint, logger)
    logger.info(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(dataset)} samples, "
        f"{global_batch_size} per step on {launch.world_size} processes, steps {first_step} to {last_step}"
    )
    logger.info(describe_length(config, global_batch_size, len(dataset)))

    # The training loop
    wrapped_model.train()
    uniforms_per_sample = 2 * model.image_seq_len + 2
    progress = tqdm(range(first_step, last_step), initial=first_step, total=last_step, disable=not is_main)
    timer, timed_from = time.perf_counter(), first_step
    reported = reported_status(output_dir, first_step, training.process_group_timeout)
    with StopSignals() as signals, reported as status:
        guard = StepGuard(state.nonfinite_steps, training.max_nonfinite_steps, signals, saver, logger)
        for step in progress:
            fault_point("step", step)
            lr = set_learning_rate(optimizer, step, config)
            max_ratio = perturbation_ratio(step, config.model.generator)
            step_terms = []
            for micro_step in range(micro_steps):
                batch = next(batches)
                first = (launch.rank * micro_steps + micro_step) * training.per_gpu_batch_size  # in the global batch
                uniforms = sample_uniforms(training.seed, step, first, training.per_gpu_batch_size, uniforms_per_sample)
                torch.manual_seed(dropout_seed(training.seed, step, micro_step, launch.rank))
                is_last = micro_step == micro_steps - 1
                with nullcontext() if is_last else accelerator.no_sync(wrapped_model):  # one all-reduce per step
                    terms = training_step(wrapped_model, tokenizer, batch, uniforms, max_ratio, config)
                    accelerator.backward(terms.loss / micro_steps)
                step_terms.append(terms)
            grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm))
            losses_and_norm = torch.stack([*(terms.loss.detach() for terms in step_terms), grad_norm])
            if guard.allows_update(step, losses_and_norm):
                optimizer.step()
                if ema_updater:
                    ema_updater.update(model)
            optimizer.zero_grad(set_to_none=True)

            state.global_step = status.step = done = step + 1
            state.samples_seen += global_batch_size
            state.nonfinite_steps = guard.nonfinite_steps
            if done == 1 or done % config.experiment.log_every == 0:
                metrics = mean_over_ranks(step_terms, accelerator)
                metrics |= {"lr": lr, "perturbation_ratio": max_ratio, "nonfinite_steps": guard.nonfinite_steps}
                metrics |= passes_done(config, state.samples_seen, len(dataset))
                metrics["skipped_images"] = sum_over_ranks(batches.num_skipped, accelerator.device)
                now = time.perf_counter()
                samples = (done - timed_from) * global_batch_size / launch.world_size
                metrics["samples/sec/gpu"], timer, timed_from = samples / (now - timer), now, done
                if done == 1 or done % config.experiment.log_grad_norm_every == 0:
                    metrics["grad_norm"] = float(grad_norm)
                if tracker:
                    tracker.log(metrics, done)
                progress.set_postfix(loss=f"{metrics['train/loss']:.3f}", ar=f"{metrics['train/ar_loss']:.3f}")
            if guard.stop:
                break
            if done % config.experiment.save_every == 0 and done < last_step:
                snapshot = take_snapshot(model, optimizer, ema, training.fsdp)
                if is_main:
                    saver.start(state, snapshot)
            may_sample = tracker and not training.fsdp  # generation reads the parameters in no forward pass
            if may_sample and (done % config.experiment.generate_every == 0 or done == last_step):
                tracker.log_image("samples", save_sample_grid(ema or model, tokenizer, config, done), done)

        snapshot = take_snapshot(model, optimizer, ema, training.fsdp)
        if is_main and start.checkpoint != str(output_dir / f"checkpoint-{status.step}"):
            saver.start(state, snapshot)
            saver.wait()
        if max_over_ranks(torch.tensor(float(saver.failures_in_a_row), device=accelerator.device)) > 0:
            raise TrainingError(f"step {status.step}: the save failed at the end; {saver.describe_last_good()}")
        status.status = "completed" if status.step == last_step else "preempted"
        status.reason = "" if status.status == "completed" else signals.received or "a signal to another rank"
        if is_main and status.status == "completed":
            save_weights(snapshot.ema or snapshot.model, output_dir / "model.safetensors")
            save_training_curves(output_dir / "metrics.jsonl", output_dir / "training_curves.png")
    logger.info(f"{status.status} at step {status.step} ({status.reason or 'all steps'}): {output_dir}")
    if tracker:
        tracker.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return status.status


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


def mean_over_ranks(step_terms: list[LossTerms], accelerator: Accelerator) -> dict[str, float]:
    """Mean of the loss terms over the micro-batches and ranks of one step: one all-reduce, one host sync."""
    names = ["loss", "ar_loss", "proj_loss", "correct_tokens"]
    values = torch.stack([torch.stack([getattr(terms, name).detach() for name in names]) for terms in step_terms])
    means = accelerator.reduce(values.mean(dim=0), reduction="mean").tolist()
    return dict(zip((f"train/{name}" for name in names), means, strict=True))


if __name__ == "__main__":
    with input_errors_exit():
        if main(CONFIG) == "preempted":
            raise SystemExit(EXIT_PREEMPTED)
