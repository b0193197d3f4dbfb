"""Parts that compare numbers on this device: with those of the published code (tests/fixtures), and bf16 with float32.

All in float32 without TF32, unless a line says otherwise.
"""

import json
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from evaluation.inception import Inception
from evaluation.metrics import frechet_distance
from evaluation.moments import Moments, ScoreSums
from evaluation.precision_recall import precision_recall
from modeling.losses import LossTerms, rear_loss
from modeling.rear import ReAR
from modeling.sampling.generate import guidance_schedule, guide
from modeling.tokenizers.registry import build_tokenizer
from scripts.benchmarks.measure import device
from scripts.benchmarks.precision import teacher_forced
from scripts.gpu_checks.findings import Findings, Machine
from scripts.gpu_checks.sampling import made_up_model
from tests.evaluation.made_up import fixture_features, fixture_images, inception_state, softmax_weights
from tests.modeling.tokenizers.made_up import formula_weight
from utils.distributed import DistributedContext
from utils.files.weights import load_state_dict
from utils.images import to_float
from utils.precision import matmul_precision
from utils.schema import ModelConfig, VQModelConfig

FIXTURES = Path(__file__).parents[2] / "tests/fixtures"
BF16_LOGITS, BF16_GRADIENT = 0.015, 0.03  # on a CPU: 0.004 at the sizes of reAR-B, 0.008
PUBLISHED = "as by the published code"


def fixture(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / name) as arrays:
        return {key: torch.from_numpy(arrays[key]).to(device()) for key in arrays.files if key != "grad_norm_names"}


def largest(found: Tensor, wanted: Tensor) -> float:
    return (found.detach().double() - wanted.double()).abs().max().item()


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / (wanted - wanted.mean()).norm()).item()


def fixture_model() -> tuple[ReAR, ModelConfig]:
    published = json.loads((FIXTURES / "rear_tiny.json").read_text())["model"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), published))
    assert isinstance(config, ModelConfig)
    model = ReAR(config)
    model.load_state_dict(load_state_dict(FIXTURES / "rear_tiny.safetensors"))
    return model.to(device()).eval(), config


def backward(model: ReAR, config: ModelConfig, expected: dict[str, Tensor], bf16: bool) -> tuple[Tensor, LossTerms]:
    """Logits and losses of the noisy context; leaves gradients."""
    model.zero_grad()
    with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
        output = model(expected["noisy_ids"], expected["labels"])
    terms = rear_loss(
        logits=output.logits,
        encode_z=output.encode_z,
        decode_z=output.decode_z,
        codes=expected["ids"],
        codebook_vectors=expected["features"],
        perturbation_mask=expected["perturb_mask"],
        config=config.generator,
    )
    terms.loss.backward()
    return output.logits, terms


@matmul_precision(tf32=False)
def model_parity(findings: Findings, machine: Machine, work: Path) -> None:
    (model, config), expected = fixture_model(), fixture("rear_tiny.npz")
    logits, terms = backward(model, config, expected, bf16=False)
    findings.at_most(f"logits of a noisy context {PUBLISHED}", largest(logits, expected["logits_noisy"][:, :-1]), 1e-4)
    for name in ("ar_loss", "proj_loss"):
        found = terms.metrics[f"train/{name}"]
        assert isinstance(found, Tensor)
        findings.at_most(f"{name} {PUBLISHED}", largest(found, expected[f"{name}_noisy"]), 1e-4)
    names = np.load(FIXTURES / "rear_tiny.npz")["grad_norm_names"]
    parameters = dict(model.named_parameters())
    norms = torch.stack([parameters[str(name)].grad.norm() for name in names])  # type: ignore[union-attr]
    scale = expected["grad_norms"] + 1e-3  # some norms are zero but for rounding
    error = largest(norms / scale, expected["grad_norms"] / scale)
    findings.at_most(f"norms of {len(names)} gradients {PUBLISHED}, relative", error, 1e-3)
    ids, labels = expected["ids"].long(), expected["labels"].long()
    cond = teacher_forced(model, labels, ids, torch.float32)
    uncond = teacher_forced(model, torch.full_like(labels, model.null_class), ids, torch.float32)
    findings.at_most(f"logits of cached decoding {PUBLISHED}", largest(cond, expected["cond_logits"]), 1e-4)
    scales = guidance_schedule(float(expected["guidance_scale"]), float(expected["guidance_scale_pow"]), ids.shape[1])
    guided = guide(cond, uncond, torch.tensor(scales, device=device())[:, None])
    findings.at_most(f"guided logits {PUBLISHED}", largest(guided, expected["guided_logits"]), 1e-3)


@torch.inference_mode()
@matmul_precision(tf32=False)
def tokenizer_parity(findings: Findings, machine: Machine, work: Path) -> None:
    grey = torch.arange(256, dtype=torch.uint8).expand(1, 1, 3, 256).mT  # (B, H, W, 3)
    differing = int((to_float(grey.to(device())).cpu() != to_float(grey)).sum())
    findings.no_difference("inputs made of all bytes, here and on a CPU", differing, grey.numel())
    tokenizer, expected = build_tokenizer(VQModelConfig()).eval(), fixture("maskgitvq_expected.npz")
    shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    tokenizer.load_state_dict({key: formula_weight(key, shape) for key, shape in shapes.items()})
    tokenizer.to(device())
    images, codes = expected["image"][None], expected["decode_ids"].long()
    features = tokenizer.encode_latents(images)[0]  # (N, Z)
    findings.at_most(
        f"features of an image of 256 pixels {PUBLISHED}", largest(features, expected["encoder_out"].flatten(1).T), 1e-3
    )
    agreement = (tokenizer.encode(images) == expected["codes"]).float().mean().item()
    findings.at_least(f"share of its codes {PUBLISHED}", agreement, 0.99)
    pixels = tokenizer.decode_unclamped(codes)[0, :, ::4, ::4]
    findings.at_most(f"pixels of decoded codes {PUBLISHED}", largest(pixels, expected["decoded_unclamped"]), 1e-3)


@matmul_precision(tf32=False)
def bfloat16(findings: Findings, machine: Machine, work: Path) -> None:
    model, config = made_up_model(machine)
    labels = torch.arange(2, device=device())
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(model.codebook_size, (2, config.image_seq_len), generator=generator).to(device())
    with torch.inference_mode():
        exact = model(codes, labels).logits
        with torch.autocast(device().type, torch.bfloat16):
            rounded = model(codes, labels).logits
    decoded = teacher_forced(model, labels, codes, torch.bfloat16)
    relative = "in bf16, from float32, relative"
    findings.at_most(f"logits of the forward pass {relative}", relative_rms(rounded.float(), exact), BF16_LOGITS)
    findings.at_most(f"logits of cached decoding {relative}", relative_rms(decoded, exact), BF16_LOGITS)
    (small, small_config), expected, gradients = fixture_model(), fixture("rear_tiny.npz"), []
    for bf16 in (False, True):
        backward(small, small_config, expected, bf16)
        gradients.append(torch.cat([p.grad.flatten() for p in small.parameters() if p.grad is not None]))
    findings.at_most(f"gradient {relative}", relative_rms(gradients[1], gradients[0]), BF16_GRADIENT)


@torch.inference_mode()
@matmul_precision(tf32=False)
def evaluator_parity(findings: Findings, machine: Machine, work: Path) -> None:
    expected = fixture("adm_expected.npz")
    torch.save(inception_state(), work / "inception.pth")
    inception = Inception(device(), work / "inception.pth")
    for edge in (64, 256):
        features = inception(torch.from_numpy(fixture_images(edge)).to(device()))
        assert features.spatial is not None
        for name, found in (("pool", features.pool), ("spatial", features.spatial)):
            wanted = expected[f"{name}_{edge}"]
            error = largest(found, wanted) / wanted.abs().max().item()
            findings.at_most(f"{name} features of images of {edge} pixels as by the original, relative", error, 1e-4)
    if machine.gpus == 0:
        findings.skip("FID, Inception Score, precision and recall", "on a CPU tests/evaluation compares them")
        return
    reference, samples = fixture_features(2400, 12).to(device()), fixture_features(5200, 13, 0.03, 0.9).to(device())
    moments = [Moments(reference.shape[1], device()) for _ in range(2)]
    for sums, of in zip(moments, (reference, samples), strict=True):
        sums.update(of)
    fid = frechet_distance(*moments[0].mean_and_covariance(), *moments[1].mean_and_covariance())
    findings.at_most("FID as by the original, relative", abs(fid / expected["fid"].item() - 1), 1e-6)
    log_probs = (samples.double() @ softmax_weights().to(device()).double()).log_softmax(1)
    score = ScoreSums(len(samples), log_probs.shape[1], device())
    score.update(0, log_probs)
    error = abs(score.inception_score() / expected["inception_score"].item() - 1)
    findings.at_most("Inception Score as by the original, relative", error, 1e-5)
    shares = precision_recall(reference.half(), samples.half(), DistributedContext(0, 1, device()))
    for name, value in zip(("precision", "recall"), shares, strict=True):
        findings.at_most(f"{name} as by the original", abs(value - expected[name].item()), 1e-3)
