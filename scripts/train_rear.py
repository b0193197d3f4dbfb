"""Train reAR, or the plain AR baseline, on tokenizer codes.

    accelerate launch --multi_gpu --num_processes 8 scripts/train_rear.py \\
        config=configs/rear_b.yaml experiment.output_dir=outputs/rear_b

Reads pre-tokenized codes (`dataset.params.pretokenization`) or images, which it tokenizes on the fly
(`dataset.params.train_shards_path_or_url`). With `experiment.eval_every`, held-out losses are logged: on the codes of
`dataset.params.eval_pretokenization`, or on the images of `eval_shards_path_or_url`. The plain AR baseline is
`model.generator.perturb_mode=none model.generator.transition_alignment=false`. The same command again continues the
run.

Writes to `experiment.output_dir`: config.yaml, environment.txt, log.txt, metrics.jsonl, status.json,
checkpoint-<step>/, train_generated_images/<step>.png, training_curves.png, heldout_loss_by_position.png and, when
complete, model.safetensors (the EMA if there is one). The exit status is 75 after a stop signal.
"""

import sys
from pathlib import Path

READS = (
    *("experiment", "-experiment.generator_checkpoint", "model", "optimizer", "lr_scheduler", "training"),
    *("dataset", "-dataset.preprocessing.pretokenize_crops"),
    *("sampling.seed", "sampling.order", "sampling.uint8_rule", "sampling.per_gpu_batch_size"),
)

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory
    from utils.config import load_config_or_exit
    from utils.config_checks import check_training

    CONFIG = load_config_or_exit(__doc__, READS, check_training)

from functools import partial

import torch

from data.training_batches import TrainingBatches, describe_length, open_training_data, passes_done
from evaluation.validator import Validator
from modeling.noise import num_noise_uniforms, perturbation_ratio, random_order_ratio
from modeling.rear import ReAR, init_from
from modeling.sampling.sample_grid import notices_of_images, save_sample_grid, whole_model
from modeling.tokenizers.registry import load_tokenizer
from modeling.training_step import compile_blocks, num_order_uniforms, training_cost, training_step
from utils.config import Config
from utils.errors import input_errors_exit
from utils.optim import MovingAverage, build_optimizer, set_learning_rate
from utils.randomness import dropout_seed
from utils.run.sharding import accumulating, clip_gradients, parallelize
from utils.run.training_run import EXIT_STATUS, TrainingRun

SAVING_MEMORY = (
    "a smaller training.per_gpu_batch_size (give training.global_batch_size, and the accumulation follows), "
    "model.generator.use_checkpoint=true or training.fsdp=true"
)


def main(config: Config) -> str:
    """Train until the last step or a stop signal; returns what `status.json` says then."""
    training, experiment, generator = config.training, config.experiment, config.model.generator
    tokenizer = load_tokenizer(config)
    with TrainingRun(config, SAVING_MEMORY) as run:
        ctx, device = run.ctx, run.ctx.device

        # Data, model, optimizer
        tokenizer_sha256 = tokenizer.sha256()
        dataset = run.open_data(lambda: open_training_data(config, tokenizer_sha256, ctx.is_rank0), tokenizer_sha256)
        tokenizer.to(device)
        validation = Validator.open(config, tokenizer, tokenizer_sha256, ctx)
        torch.manual_seed(training.seed)
        model = ReAR(config.model).to(device)
        if run.is_new and experiment.init_from is not None:
            init_from(experiment.init_from, model)
            run.notices.append(f"starting from the weights of {experiment.init_from}, with new rows for the classes")
        ema = MovingAverage(model, training.ema_decay) if training.use_ema else None
        parallel = parallelize(model, model.blocks, ctx, training)
        if ema and training.fsdp:
            parallelize(ema.module, ema.module.blocks, ctx, training)
        run.notices += compile_blocks(model, config, device)
        optimizer = build_optimizer(model, config)
        averaged = ema.module if ema else model
        modules = {"model": model} | ({"ema": averaged} if ema else {})
        cost = training_cost(model, config, ctx.size * run.micro_steps)
        run.notices += notices_of_images(tokenizer, config)
        if validation is None and experiment.eval_every:
            run.notices.append("experiment.eval_every has no effect: the config names no held-out data")
        run.notices.append(describe_length(config, run.global_batch_size, len(dataset)))
        run.begin(modules, {"optimizer": (model, optimizer)}, training.fsdp, cost.flops, cost.activation_bytes)
        run.reporter.alerts.check_schedules(config)
        work = (run.micro_steps, run.remaining, run.state.samples_seen)
        widths = num_noise_uniforms(model.image_seq_len), num_order_uniforms(generator)
        batches = TrainingBatches(dataset, config, ctx, *work, run.stop_requested, *widths)

        # The training loop
        parallel.train()
        for step in run.steps():
            lr = set_learning_rate(optimizer, step, config)
            max_ratio, order_ratio = perturbation_ratio(step, generator), random_order_ratio(step, generator)
            step_terms = []
            for micro_step in range(run.micro_steps):
                batch = run.measured.next_batch(batches)
                torch.manual_seed(dropout_seed(training.seed, step, micro_step, ctx.rank))
                with accumulating(parallel, is_last=micro_step == run.micro_steps - 1):
                    terms = training_step(parallel, tokenizer, batch, max_ratio, config, order_ratio)
                    (terms.loss / run.micro_steps).backward()
                step_terms.append(terms)
            grad_norm = clip_gradients(model, training.max_grad_norm, training.fsdp)
            if run.update_is_finite(torch.stack([*(terms.loss.detach() for terms in step_terms), grad_norm])):
                optimizer.step()
                if ema:
                    ema.update(model)
                run.measured.add([terms.metrics for terms in step_terms], grad_norm)
            optimizer.zero_grad(set_to_none=True)
            run.count_step()

            if run.triggers.log:
                ratios = {"train/perturbation_ratio": max_ratio, "train/random_order_ratio": order_ratio}
                run.log_interval({"train/lr": lr} | ratios | passes_done(config, run.state.samples_seen, len(dataset)))
            if run.triggers.validation and validation is not None:
                validation.compute(averaged, run)
            if run.triggers.save:
                run.save()
            if run.triggers.weights:
                run.keep_weights("ema" if ema else "model")
            if run.triggers.grid:
                if tokenizer.has_images:
                    whole = whole_model(averaged, run)
                    run.reporter.draw("samples", partial(save_sample_grid, whole, tokenizer, config, step + 1))
                    del whole  # sharded, it takes as much memory as all shards
                run.reporter.draw_curves()

        if run.finish():
            run.export("ema" if ema else "model")
    return run.status


if __name__ == "__main__":
    with input_errors_exit():
        raise SystemExit(EXIT_STATUS[main(CONFIG)])
