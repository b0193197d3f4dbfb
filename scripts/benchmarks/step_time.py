"""Seconds per training step of a config, measured on this machine by a few steps on made-up data."""

from dataclasses import replace

from modeling.rear import ReAR
from modeling.tokenizers.registry import build_tokenizer
from scripts.benchmarks.measure import device
from scripts.benchmarks.training import Steps, made_up_batch, our_loss
from utils.config import Config
from utils.timing import median_seconds


def generator_step_seconds(config: Config) -> float:
    tokenizer = build_tokenizer(config.model.vq_model).to(device()).eval().requires_grad_(False)
    model = ReAR(config.model).to(device())
    config = replace(config, training=replace(config.training, compile="off"))
    steps = Steps(model, tokenizer, made_up_batch(model, config), config, loss=our_loss, fused=True)
    return median_seconds(steps.take)
