"""Numbers on this device against those of the published code (tests/fixtures), and bf16 against float32.

In float32 without TF32, unless a line says otherwise.
"""

import json
import platform
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from evaluation.inception import Inception
from evaluation.metrics import Moments, ScoreSums, frechet_distance
from evaluation.precision_recall import precision_recall
from modeling.losses import LossTerms, rear_loss
from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler
from modeling.taps import taps_of
from modeling.tokenizers.registry import build_tokenizer
from tests.evaluation.made_up import fixture_features, fixture_images, inception_state, softmax_weights
from tests.gpu.checks.conftest import Report
from tests.gpu.checks.made_up import DEVICE, ON_GPU, made_up_model
from tests.modeling.tokenizers.made_up import formula_weight
from utils.distributed import DistributedContext
from utils.files.weights import load_state_dict
from utils.images import to_float
from utils.precision import matmul_precision
from utils.run.manifest import versions
from utils.run.run_environment import commit
from utils.schema import GeneratorConfig, ModelConfig, VQModelConfig

pytestmark = pytest.mark.gpu
FIXTURES = Path(__file__).parents[2] / "fixtures"
BF16_LOGITS, BF16_GRADIENT = 0.015, 0.03  # relative; measured on a CPU: 0.004 at the sizes of reAR-B, 0.008
PUBLISHED = "against the published code"


def test_environment(report: Report) -> None:
    gpus = torch.cuda.device_count() if ON_GPU else 0
    report.figure("device", torch.cuda.get_device_name() if gpus else f"CPU, {platform.machine()}")
    report.figure("GPUs", gpus)
    for name, value in {"commit": commit() or "unknown", **versions(), "triton": installed_version("triton")}.items():
        report.figure(name, value)
    report.figure("C compiler", shutil.which("gcc") or shutil.which("cc") or "none")
    if gpus:
        report.figure("CUDA of torch, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
        report.figure("compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
        free, total = torch.cuda.mem_get_info()
        report.figure("memory of the first GPU, bytes: total, free", f"{total}, {free}")
    for device in [f"cuda:{index}" for index in range(gpus)] or ["cpu"]:
        report.at_most(f"a matrix product on {device}, from float64, relative", product_error(device), 1e-5)


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@matmul_precision(tf32=False)
def product_error(device: str) -> float:
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double()
    return (((a.to(device) @ a.to(device)).cpu() - exact).norm() / exact.norm()).item()


@matmul_precision(tf32=False)
def test_model(report: Report) -> None:
    model, config = fixture_model()
    expected = fixture("rear_tiny.npz")
    logits, terms = backward(model, config, expected, bf16=False)
    difference = largest(logits, expected["logits_noisy"][:, :-1])
    report.at_most(f"logits of a perturbed context {PUBLISHED}", difference, 1e-4)
    for name in ("ar_loss", "proj_loss"):
        found = terms.metrics[f"train/{name}"]
        assert isinstance(found, Tensor)
        report.at_most(f"{name} {PUBLISHED}", largest(found, expected[f"{name}_noisy"]), 1e-4)
    names = np.load(FIXTURES / "rear_tiny.npz")["grad_norm_names"]
    parameters = dict(model.named_parameters())
    norms = torch.stack([parameters[str(name)].grad.norm() for name in names])
    scale = expected["grad_norms"] + 1e-3  # some norms are zero but for rounding
    error = largest(norms / scale, expected["grad_norms"] / scale)
    report.at_most(f"norms of {len(names)} gradients {PUBLISHED}, relative", error, 1e-3)

    guidance = float(expected["guidance_scale"]), float(expected["guidance_scale_pow"])
    guided = replace(config.generator, guidance_scale=guidance[0], guidance_scale_pow=guidance[1])
    plain = replace(config.generator, guidance_scale=1.0)
    for name, generator, bound in (("cond_logits", plain, 1e-4), ("guided_logits", guided, 1e-3)):
        found = decoding_logits(model, expected["labels"], expected["ids"], generator)
        report.at_most(f"{name} of cached decoding {PUBLISHED}", largest(found, expected[name]), bound)


@torch.inference_mode()
@matmul_precision(tf32=False)
def test_tokenizer(report: Report) -> None:
    grey = torch.arange(256, dtype=torch.uint8).expand(1, 1, 3, 256).mT  # (B, H, W, 3)
    differing = int((to_float(grey.to(DEVICE)).cpu() != to_float(grey)).sum())
    report.no_difference("floats of all bytes, here and on a CPU", differing, grey.numel())
    tokenizer, expected = build_tokenizer(VQModelConfig()).eval(), fixture("maskgitvq_expected.npz")
    shapes = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    tokenizer.load_state_dict({key: formula_weight(key, shape) for key, shape in shapes.items()})
    tokenizer.to(DEVICE)
    images, codes = expected["image"][None], expected["decode_ids"].long()
    latents = tokenizer.encode_latents(images)[0]  # (N, Z)
    difference = largest(latents, expected["encoder_out"].flatten(1).T)
    report.at_most(f"latents of an image of 256 pixels {PUBLISHED}", difference, 1e-3)
    agreement = (tokenizer.encode(images) == expected["codes"]).float().mean().item()
    report.at_least(f"share of equal codes {PUBLISHED}", agreement, 0.99)
    pixels = tokenizer.decode_unclamped(codes)[0, :, ::4, ::4]
    report.at_most(f"pixels of decoded codes {PUBLISHED}", largest(pixels, expected["decoded_unclamped"]), 1e-3)


@matmul_precision(tf32=False)
def test_bf16(report: Report) -> None:
    model, config = made_up_model()
    labels = torch.arange(2, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(model.codebook_size, (2, config.image_seq_len), generator=generator).to(DEVICE)
    with torch.inference_mode():
        exact = model(codes, labels).logits
        with torch.autocast(DEVICE.type, torch.bfloat16):
            rounded = model(codes, labels).logits
    plain = replace(config, guidance_scale=1.0)
    decoded = decoding_logits(model, labels, codes, plain, torch.bfloat16)
    relative = "in bf16, from float32, relative"
    report.at_most(f"logits of the forward pass {relative}", relative_rms(rounded.float(), exact), BF16_LOGITS)
    report.at_most(f"logits of cached decoding {relative}", relative_rms(decoded, exact), BF16_LOGITS)
    small, small_config = fixture_model()
    expected, gradients = fixture("rear_tiny.npz"), []
    for bf16 in (False, True):
        backward(small, small_config, expected, bf16)
        gradients.append(torch.cat([p.grad.flatten() for p in small.parameters() if p.grad is not None]))
    report.at_most(f"gradient {relative}", relative_rms(gradients[1], gradients[0]), BF16_GRADIENT)


def test_attention(report: Report) -> None:
    """A fused kernel serves the shapes of training and of the decoding graph (docs/gpu.md)."""
    if not ON_GPU:
        report.skip("kernels of the attention", "a CPU has others")
        return
    cuda = torch.backends.cuda
    for d in (48, 64):
        q = torch.zeros(2, 16, 288, d, dtype=torch.bfloat16, device=DEVICE)
        mask = torch.zeros(2, 16, 1, 32, dtype=torch.bfloat16, device=DEVICE)
        training = cuda.SDPAParams(q, q, q, None, 0.1, True, False)
        decoding = cuda.SDPAParams(q[:, :, :1], q[:, :, :32], q[:, :, :32], mask, 0.0, False, False)
        for where, fits in (
            ("training: flash", cuda.can_use_flash_attention(training)),
            ("decoding: memory-efficient", cuda.can_use_efficient_attention(decoding)),
        ):
            report.compare(f"attention with d = {d}, {where}", fits, True, fits)


@torch.inference_mode()
@matmul_precision(tf32=False)
def test_evaluator(report: Report, tmp_path: Path) -> None:
    expected = fixture("adm_expected.npz")
    torch.save(inception_state(), tmp_path / "inception.pth")
    inception = Inception(DEVICE, tmp_path / "inception.pth")
    for edge in (64, 256):
        features = inception(torch.from_numpy(fixture_images(edge)).to(DEVICE))
        assert features.spatial is not None
        for name, found in (("pool", features.pool), ("spatial", features.spatial)):
            published = expected[f"{name}_{edge}"]
            error = largest(found, published) / published.abs().max().item()
            report.at_most(f"{name} features of images of {edge} pixels {PUBLISHED}, relative", error, 1e-4)
    if not ON_GPU:
        report.skip("FID, Inception Score, precision and recall", "on a CPU tests/evaluation compares them")
        return
    reference, samples = fixture_features(2400, 12).to(DEVICE), fixture_features(5200, 13, 0.03, 0.9).to(DEVICE)
    moments = [Moments(reference.shape[1], DEVICE) for _ in range(2)]
    moments[0].update(reference)
    moments[1].update(samples)
    fid = frechet_distance(moments[0].gaussian(), moments[1].gaussian())
    report.at_most(f"FID {PUBLISHED}, relative", abs(fid / expected["fid"].item() - 1), 1e-6)
    log_probs = (samples.double() @ softmax_weights().to(DEVICE).double()).log_softmax(1)
    score = ScoreSums(len(samples), log_probs.shape[1], DEVICE)
    score.update(0, log_probs)
    error = abs(score.inception_score() / expected["inception_score"].item() - 1)
    report.at_most(f"Inception Score {PUBLISHED}, relative", error, 1e-5)
    precision, recall = precision_recall(reference.half(), samples.half(), DistributedContext(0, 1, DEVICE))
    report.at_most(f"precision {PUBLISHED}", abs(precision - expected["precision"].item()), 1e-3)
    report.at_most(f"recall {PUBLISHED}", abs(recall - expected["recall"].item()), 1e-3)


def fixture(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / name) as arrays:
        return {key: torch.from_numpy(arrays[key]).to(DEVICE) for key in arrays.files if key != "grad_norm_names"}


def fixture_model() -> tuple[ReAR, ModelConfig]:
    published = json.loads((FIXTURES / "rear_tiny.json").read_text())["model"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), published))
    assert isinstance(config, ModelConfig)
    model = ReAR(config)
    model.load_state_dict(load_state_dict(FIXTURES / "rear_tiny.safetensors"))
    return model.to(DEVICE).eval(), config


def backward(model: ReAR, config: ModelConfig, expected: dict[str, Tensor], bf16: bool) -> tuple[Tensor, LossTerms]:
    """Logits and losses of the perturbed context; leaves gradients."""
    model.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        output = model(expected["noisy_ids"], expected["labels"])
    terms = rear_loss(
        logits=output.logits,
        projections=output.projections,
        codes=expected["ids"],
        targets=dict.fromkeys(output.projections, expected["features"]),
        perturbation_mask=expected["perturb_mask"],
        taps=taps_of(config.generator),
        config=config.generator,
    )
    terms.loss.backward()
    return output.logits, terms


def decoding_logits(
    model: ReAR, labels: Tensor, codes: Tensor, config: GeneratorConfig, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits (B, N, V) of cached decoding where codes (B, N) are given: all but the last, which predicts nothing."""
    logits = []

    def keep(head: nn.Module, inputs: object, output: Tensor) -> None:
        logits.append(output.clone())

    given = torch.ones(codes.shape, dtype=torch.bool)
    given[:, -1] = False
    hook = model.lm_head.register_forward_hook(keep)
    try:
        sampler = CodeSampler(model, config, dtype)
        uniforms = torch.zeros(codes.shape)
        sampler(labels.long().cpu(), uniforms, conditioning_codes=codes.long().cpu(), conditioning_mask=given)
    finally:
        hook.remove()
    return torch.stack(logits, dim=1)


def largest(found: Tensor, expected: Tensor) -> float:
    return (found.detach().double() - expected.double()).abs().max().item()


def relative_rms(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / (expected - expected.mean()).norm()).item()
