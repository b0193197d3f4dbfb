"""Train reAR, or the plain AR baseline, on tokens of images.

    accelerate launch --multi_gpu --num_processes 8 scripts/train_rear.py \\
        config=configs/rear_b.yaml experiment.output_dir=outputs/rear_b

Reads stored tokens (`dataset.params.pretokenization`) or images, which it tokenizes on the fly
(`dataset.params.train_shards_path_or_url`). With `experiment.eval_every`, validation losses are logged: on the tokens
of `dataset.params.eval_pretokenization`, or on the images of `eval_shards_path_or_url`. The plain AR baseline is
`model.generator.perturb_mode=none model.generator.transition_alignment=false`. Rerun the same command to resume.

Writes to `experiment.output_dir`: config.yaml, environment.txt, log.txt, metrics.jsonl, status.json,
checkpoint-<step>/, train_generated_images/<step>.png, training_curves.png, heldout_loss_by_position.png and, when
complete, model.safetensors (the EMA if there is one). The exit status is 75 after a stop signal.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import load_config_or_exit
from utils.config_checks import check_training
from utils.schema import Config

READS = {
    "experiment": "all but generator_checkpoint",
    "model": "all",
    "dataset.params": "all",
    "dataset.preprocessing": "all but pretokenize_crops",
    "optimizer": "all",
    "lr_scheduler": "all",
    "training": "all",
    "sampling": "seed order uint8_rule per_gpu_batch_size",
}

if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(Config, __doc__, READS, check=check_training)

import torch

from data.training_batches import (
    TrainingBatches,
    classes_without_samples,
    describe_length,
    open_training_data,
    passes_done,
)
from evaluation.validator import Validator, notices_of_images, save_sample_grid
from modeling.loading import init_from_weights, load_tokenizer
from modeling.orders import num_order_uniforms, random_order_ratio
from modeling.perturbation import num_perturbation_uniforms, perturbation_ratio
from modeling.rear import ReAR
from modeling.targets.registry import Targets, need_images
from modeling.tokenizers.tokenizer import Tokenizer
from modeling.training_step import compile_blocks, training_step
from utils.errors import first_of, input_errors_exit
from utils.optim import MovingAverage, build_optimizers, describe_optimizers, set_learning_rate
from utils.randomness import dropout_seed
from utils.run.estimates import training_cost
from utils.run.launch import launch
from utils.run.resume import untrained_classes
from utils.run.sharding import accumulating, clip_gradients, parallelize, unsharded
from utils.run.status import EXIT_STATUS
from utils.run.training_run import TrainingRun
from utils.run.weights_path import NO_TOKENIZER, check_weights, find_weights
from utils.schedules import ema_warm_up, schedule_warnings

MEMORY_HINT = (
    "a smaller training.per_gpu_batch_size (give training.global_batch_size, and the accumulation follows), "
    "model.generator.use_checkpoint=true or training.fsdp=true"
)


def main(config: Config) -> str:
    """Train until the last step or a stop; returns the status in `status.json`."""
    training, experiment, generator = config.training, config.experiment, config.model.generator
    tokenizer = load_tokenizer(config)
    with launch(config) as launched:
        ctx = launched.ctx

        # Data
        tokenizer_sha256 = tokenizer.sha256()
        dataset, provenance = launched.open_data(
            lambda: open_training_data(config, tokenizer_sha256, ctx.is_rank0, need_images(generator)), tokenizer_sha256
        )
        without_samples = classes_without_samples(dataset, generator.condition_num_classes)
        provenance.untrained_classes = untrained_classes(launched.start, without_samples)
        tokenizer.to(ctx.device)
        launched.notes += notices_of_images(tokenizer, config)
        targets = ctx.rank0_first(lambda: Targets(config, tokenizer, num_samples=len(dataset)))
        launched.notes.append(targets.describe())
        validation = Validator.open(config, tokenizer, tokenizer_sha256, targets, ctx)
        if validation is None and experiment.eval_every:
            launched.notes.append("experiment.eval_every has no effect: the config names no validation data")

        # Model and optimizer
        torch.manual_seed(training.seed)
        model = ReAR(config.model).to(ctx.device)
        if launched.is_new and experiment.init_from is not None:
            weights = find_weights(experiment.init_from)
            check_weights(weights, tokenizer_sha256, config)
            init_from_weights(model, weights.path)
            launched.notes.append(f"starting from the weights of {experiment.init_from}, with new rows for the classes")
            if weights.tokenizer_sha256 is None:
                launched.notes.append(f"{weights.path}: {NO_TOKENIZER}")
        ema = MovingAverage(model, training.ema_decay) if training.use_ema else None
        parallel = parallelize(model, model.blocks, ctx, training)
        if ema and training.fsdp:
            parallelize(ema.module, ema.module.blocks, ctx, training)
        launched.notes += compile_blocks(model, config, ctx.device)
        optimizers = build_optimizers(model, config)
        launched.notes.append(describe_optimizers(optimizers))
        evaluated = ema.module if ema else model  # validation, samples and exported weights are the EMA's

        run = TrainingRun(
            launched,
            provenance,
            num_samples=len(dataset),
            modules={"model": model, "ema": ema.module} if ema else {"model": model},
            optimizers={name: (model, optimizer) for name, optimizer in optimizers.items()},
            cost=training_cost(model, config, slices=ctx.size * launched.micro_steps),
            memory_hint=MEMORY_HINT,
        )
        with run.begin():
            run.note(describe_length(config, launched.global_batch_size, len(dataset)))
            if ema:
                warm_at = run.state.ema_start + ema_warm_up(training.ema_decay)
                run.note(f"EMA: its decay rises to training.ema_decay={training.ema_decay} until step {warm_at}")
            if without_samples:
                count = f"{len(without_samples)} of {generator.condition_num_classes} classes"
                run.warn("classes", f"{count} have no training samples: {first_of(without_samples, 10)}")
            if warnings := schedule_warnings(config):
                run.warn("schedule", "; ".join(warnings))
            batches = TrainingBatches(
                dataset,
                config,
                ctx,
                micro_steps=launched.micro_steps,
                steps=run.remaining,
                samples_seen=run.state.samples_seen,
                stop_requested=run.stop_requested,
                num_uniforms=num_perturbation_uniforms(model.image_seq_len),
                num_order_uniforms=num_order_uniforms(generator),
            )

            # The training loop
            parallel.train()
            for step in run.steps():
                lr = set_learning_rate(optimizers, step, config)
                max_ratio = perturbation_ratio(step, generator)
                order_ratio = random_order_ratio(step, generator)
                losses, metrics = [], []
                for micro_step in range(launched.micro_steps):
                    batch = run.next_batch(batches)
                    torch.manual_seed(dropout_seed(training.seed, step, micro_step, ctx.rank))
                    with accumulating(parallel, is_last=micro_step == launched.micro_steps - 1):
                        terms = training_step(
                            parallel,
                            tokenizer,
                            batch,
                            max_ratio=max_ratio,
                            config=config,
                            targets=targets,
                            order_ratio=order_ratio,
                            step=step,
                        )
                        (terms.loss / launched.micro_steps).backward()
                    losses.append(terms.loss.detach())
                    metrics.append(terms.metrics)
                grad_norm = clip_gradients(model, training.max_grad_norm)
                if run.update_is_finite([*losses, grad_norm]):
                    for optimizer in optimizers.values():
                        optimizer.step()
                    if ema:
                        ema.update(model, age=step - run.state.ema_start)
                    run.add_metrics(metrics, grad_norm)
                model.zero_grad(set_to_none=True)
                run.end_step()

                if run.triggers.log:
                    progress = passes_done(config, run.state.samples_seen, len(dataset))
                    ratios = {"train/perturbation_ratio": max_ratio, "train/random_order_ratio": order_ratio}
                    run.log_interval({"train/lr": lr, **ratios, **progress})
                if run.triggers.validation and validation is not None:
                    validation.compute(evaluated, run)
                if run.triggers.save:
                    run.save()
                if run.triggers.weights:
                    run.keep_weights("ema" if ema else "model")
                if run.triggers.grid:
                    if tokenizer.has_images:
                        draw_samples(evaluated, tokenizer, config, run)
                    run.draw_curves()

            if run.finish():
                run.export("ema" if ema else "model")
    return run.status


def draw_samples(model: ReAR, tokenizer: Tokenizer, config: Config, run: TrainingRun) -> None:
    with run.pause():
        whole = unsharded(model, build=lambda: ReAR(config.model))
        run.draw("samples", lambda: save_sample_grid(whole, tokenizer, config, run.state.global_step))


if __name__ == "__main__":
    with input_errors_exit():
        raise SystemExit(EXIT_STATUS[main(CONFIG)])
