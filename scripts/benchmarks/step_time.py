"""Seconds per training step of a config, measured on this machine by a few steps on made-up images and tokens."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from modeling.rear import ReAR
from modeling.tokenizers.discriminator import FeatureDiscriminator
from modeling.tokenizers.perceptual import PerceptualFeatures
from modeling.tokenizers.registry import build_tokenizer, build_trainable_tokenizer
from scripts.benchmarks.measure import device, seconds
from scripts.benchmarks.training import Steps, made_up_batch, our_loss
from scripts.train_tokenizer import TrainTokenizerConfig, training_step
from utils.config import Config, load_config_as
from utils.optim import build_optimizers

MEASURED_STEPS = 3


def tokenizer_step_seconds(path: Path) -> float:
    """Of a config file of train_tokenizer.py: the mean over steps before and after `vq_training.perceptual_start`."""
    config = load_config_as(TrainTokenizerConfig, [f"config={path}"])
    tokenizer = build_trainable_tokenizer(config.model.vq_model).to(device())
    features = PerceptualFeatures().to(device()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    discriminator = FeatureDiscriminator(features.feature_channels).to(device())
    optimizers = build_optimizers(tokenizer, config)
    resolution = config.model.vq_model.resolution
    images = torch.rand(config.training.per_gpu_batch_size, 3, resolution, resolution, device=device())

    def take(step: int) -> None:
        terms, _ = training_step(tokenizer, features, discriminator, images, config, step=step)
        terms["train/loss"].backward()
        for optimizer in optimizers.values():
            optimizer.step()
        tokenizer.zero_grad(set_to_none=True)

    start, end = config.vq_training.perceptual_start, max(1, config.training.max_train_steps)
    late = 1 - min(1.0, start / end)  # fraction of the steps
    return (1 - late) * _median(lambda: take(0)) + late * _median(lambda: take(start))


def generator_step_seconds(config: Config) -> float:
    tokenizer = build_tokenizer(config.model.vq_model).to(device()).eval().requires_grad_(False)
    model = ReAR(config.model).to(device())
    config = replace(config, training=replace(config.training, compile="off"))
    steps = Steps(model, tokenizer, made_up_batch(model, config), config, loss=our_loss, fused=True)
    return _median(steps.take)


def _median(function: Callable[[], None]) -> float:
    function()
    return statistics.median(seconds(function) for _ in range(MEASURED_STEPS))
