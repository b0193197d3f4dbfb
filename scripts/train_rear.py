"""Train reAR, or the plain AR baseline, on tokenizer codes.

    PYTHONPATH=. accelerate launch --multi_gpu --num_processes 8 scripts/train_rear.py \\
        config=configs/rear_b.yaml experiment.output_dir=outputs/rear_b

Reads pre-tokenized codes (`dataset.params.pretokenization`) or images, which it tokenizes on the fly
(`dataset.params.train_shards_path_or_url`). The plain AR baseline is `model.generator.perturb_mode=none
model.generator.transition_alignment=false`. The same command again continues the run.

Writes to `experiment.output_dir`: config.yaml, environment.txt, log.txt, metrics.jsonl, status.json,
checkpoint-<step>/, train_generated_images/<step>.png, training_curves.png and, when complete, model.safetensors
(the EMA if there is one). The exit status is 75 after a stop signal.
"""

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    from utils.config import check_global_batch, check_tokenizer_fits, load_config_or_exit

    CONFIG = load_config_or_exit(check_tokenizer_fits, check_global_batch)

from functools import partial

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from data.training import TrainingBatches, describe_length, open_training_data, passes_done
from modeling.losses import LossTerms, drop_class_labels, perturb_codes, rear_loss
from modeling.rear import ReAR, init_from
from modeling.sampling.sample_grid import save_sample_grid
from modeling.tokenizers.maskgit_vq import MaskGitVQ, load_tokenizer
from utils.config import Config
from utils.errors import input_errors_exit
from utils.files.weights import weights_sha256
from utils.optim import build_optimizer, set_learning_rate
from utils.randomness import dropout_seed, sample_uniforms
from utils.run.sharding import clip_gradients, parallelize
from utils.run.training_run import EXIT_STATUS, TrainingRun
from utils.schedules import perturbation_ratio


def main(config: Config) -> str:
    """Train until the last step or a stop signal; returns what `status.json` says then."""
    training, experiment = config.training, config.experiment
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = training.enable_tf32
    tokenizer = load_tokenizer(config)
    with TrainingRun(config) as run:
        world, device = run.world, run.world.device

        # Data, model, optimizer
        dataset = run.open_data(lambda: open_training_data(config, weights_sha256(tokenizer), world.is_main))
        torch.manual_seed(training.seed)
        tokenizer.to(device)
        model = ReAR(config.model).to(device)
        if run.is_new and experiment.init_from is not None:
            init_from(experiment.init_from, model)
            run.notices.append(f"starting from the weights of {experiment.init_from}, with new rows for the classes")
        ema = ModelEmaV3(model, decay=training.ema_decay) if training.use_ema else None
        parallel = parallelize(model, model.blocks, world, training.fsdp)
        optimizer = build_optimizer(model, config)
        modules = {"model": model} | ({"ema": ema.module} if ema else {})
        run.begin(modules, {"optimizer": (model, optimizer)}, sharded=training.fsdp)
        run.logger.info(describe_length(config, run.global_batch_size, len(dataset)))
        batches = TrainingBatches(dataset, config, world, run.micro_steps, run.remaining, run.samples_seen)

        # The training loop
        parallel.train()
        for step in run.steps():
            lr = set_learning_rate(optimizer, step, config)
            max_ratio = perturbation_ratio(step, config.model.generator)
            step_terms = []
            for micro_step in range(run.micro_steps):
                batch = next(batches)
                first = (world.rank * run.micro_steps + micro_step) * training.per_gpu_batch_size  # in the global batch
                uniforms = sample_uniforms(
                    training.seed, step, first, training.per_gpu_batch_size, 2 * model.image_seq_len + 2
                )
                torch.manual_seed(dropout_seed(training.seed, step, micro_step, world.rank))
                with run.accumulating(parallel, micro_step):
                    terms = training_step(parallel, tokenizer, batch, uniforms, max_ratio, config)
                    (terms.loss / run.micro_steps).backward()
                step_terms.append(terms)
            grad_norm = clip_gradients(model, training.max_grad_norm)
            if run.may_update(torch.stack([*(terms.loss.detach() for terms in step_terms), grad_norm])):
                optimizer.step()
                if ema:
                    ema.update(model)
            optimizer.zero_grad(set_to_none=True)
            run.count_step()

            if run.log_due:
                metrics = run.mean_over_ranks([terms.metrics for terms in step_terms])
                metrics |= {"lr": lr, "perturbation_ratio": max_ratio, "samples/sec/gpu": run.samples_per_second()}
                metrics |= passes_done(config, run.samples_seen, len(dataset)) | batches.skipped(world)
                if step == 0 or run.is_due(experiment.log_grad_norm_every):
                    metrics["grad_norm"] = float(grad_norm)
                run.log(metrics)
            if run.save_due:
                run.save()
            if run.grid_due and not training.fsdp:  # generation reads the parameters outside a forward pass
                run.draw("samples", partial(save_sample_grid, modules.get("ema", model), tokenizer, config, step + 1))

        if run.finish():
            run.export("ema" if ema else "model")
    return run.status


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
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=config.training.mixed_precision == "bf16"):
        output = model(context, class_labels)
    return rear_loss(output, codes, tokenizer.embed(codes), perturbation_mask, generator)


if __name__ == "__main__":
    with input_errors_exit():
        raise SystemExit(EXIT_STATUS[main(CONFIG)])
