"""The model computes the published function: numbers of the published code with made-up weights (seed fixtures)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from modeling.losses import LossTerms, rear_loss
from modeling.rear import ReAR, ReAROutput
from modeling.sampling.cached_decoding import MODULATED, DecodingState, decode_one_token, prefill
from modeling.sampling.generate import guidance_schedule, guide
from modeling.taps import taps_of
from utils.schema import ModelConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    published = json.loads((FIXTURES / "rear_tiny.json").read_text())["model"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), published))
    return config


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> ReAR:
    model = ReAR(config)
    model.load_state_dict(load_file(FIXTURES / "rear_tiny.safetensors"), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / "rear_tiny.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "grad_norm_names"}


def close(actual: torch.Tensor, wanted: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, wanted, atol=atol, rtol=0, check_dtype=False)


def losses(output: ReAROutput, expected: dict, perturbation_mask: torch.Tensor, config: ModelConfig) -> LossTerms:
    return rear_loss(
        logits=output.logits,
        projections=output.projections,
        codes=expected["ids"],
        targets=dict.fromkeys(output.projections, expected["features"]),
        perturbation_mask=perturbation_mask,
        taps=taps_of(config.generator),
        config=config.generator,
    )


def test_perturbed_forward_and_losses(model: ReAR, config: ModelConfig, expected: dict) -> None:
    output = model(expected["noisy_ids"], expected["labels"])
    close(output.logits, expected["logits_noisy"][:, :-1])
    close(output.projections["encode"], expected["encode_z_noisy"][:, 2:])
    close(output.projections["decode"], expected["decode_z_noisy"][:, 1:-1])
    terms = losses(output, expected, expected["perturb_mask"], config)
    close(terms.metrics["train/ar_loss"], expected["ar_loss_noisy"].squeeze())
    close(terms.metrics["train/proj_loss"], expected["proj_loss_noisy"].squeeze())
    close(terms.metrics["train/correct_tokens"], expected["correct_noisy"].squeeze())


def test_clean_forward_and_losses(model: ReAR, config: ModelConfig, expected: dict) -> None:
    output = model(expected["ids"], expected["labels"])
    close(output.logits, expected["logits_clean"][:, :-1])
    nothing = torch.zeros_like(expected["perturb_mask"])
    terms = losses(output, expected, nothing, config)
    close(terms.metrics["train/ar_loss"], expected["ar_loss_clean"].squeeze())
    close(terms.metrics["train/proj_loss"], expected["proj_loss_clean"].squeeze())


def test_gradient_norms(model: ReAR, config: ModelConfig, expected: dict) -> None:
    model.zero_grad()
    output = model(expected["noisy_ids"], expected["labels"])
    losses(output, expected, expected["perturb_mask"], config).loss.backward()
    names = np.load(FIXTURES / "rear_tiny.npz")["grad_norm_names"]
    parameters = dict(model.named_parameters())
    assert sorted(parameters) == sorted(str(name) for name in names)
    actual = torch.stack([parameters[str(name)].grad.norm() for name in names])
    torch.testing.assert_close(actual, expected["grad_norms"], rtol=1e-3, atol=1e-6, check_dtype=False)


def test_cached_and_guided_logits(model: ReAR, expected: dict) -> None:
    """Each step of cached decoding gives the published inference logits, and so does the guidance on them."""
    ids, labels = expected["ids"], expected["labels"]
    steps = ids.shape[1]
    scales = guidance_schedule(float(expected["guidance_scale"]), float(expected["guidance_scale_pow"]), steps)
    close(torch.tensor(scales), expected["cfg_per_step"], atol=1e-6)
    with torch.no_grad():
        state = DecodingState(model, len(labels), guided=True)
        state.start(labels, torch.zeros(ids.shape))
        state.codes.copy_(ids)
        for k in range(steps):
            if (k + 1) % MODULATED == 0 or k == 0:
                state.fill_modulations(0 if k == 0 else k + 1)
            hidden = prefill(state) if k == 0 else decode_one_token(state, end=k + 2, masked=False)
            state.position.add_(1)
            cond, uncond = model.lm_head(hidden).chunk(2)
            close(cond, expected["cond_logits"][:, k])
            close(uncond, expected["uncond_logits"][:, k])
            close(guide(cond, uncond, scales[k]), expected["guided_logits"][:, k], atol=1e-3)
