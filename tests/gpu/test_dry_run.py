"""The product's own code on a GPU that has no values (`fake_gpu`): no tensor on another device, no wait for a value, no
surprising precision.

Not covered, as there is no GPU: the backward pass and activation checkpointing, streams, events, capture of graphs,
`torch.compile`, which kernel is chosen and what it computes; and what waits by design: `DecodingState.start`, checks of
values, reading results.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation import precision_recall as precision_recall_module
from evaluation.features import EncoderFeatures
from evaluation.inception import Inception
from evaluation.metrics import Moments, ScoreSums
from evaluation.precision_recall import manifold_radii, precision_recall
from evaluation.validator import ValidationTokens, batch_sums
from modeling.perturbation import num_perturbation_uniforms
from modeling.rear import ReAR
from modeling.sampling import cached_decoding
from modeling.sampling.cached_decoding import DecodingState, prefill
from modeling.sampling.generate import CodeSampler, sample_next_codes
from modeling.sampling.image_sampler import ImageDecoder
from modeling.targets.registry import Targets
from modeling.tokenizers.registry import build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from modeling.training_step import training_step
from tests.evaluation.made_up import inception_shapes
from tests.gpu.fake_gpu import FakeGpu, Watch
from utils.distributed import DistributedContext
from utils.run.metrics import IntervalMeans
from utils.schema import Config

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
B, N, U = 3, 64, 2  # images, codes of each, distinct labels


@pytest.fixture
def ctx() -> DistributedContext:
    return DistributedContext(0, 1, torch.device("cuda"))


def zeros(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cuda")


def integers(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int64)


def train(
    gpu: FakeGpu, model: ReAR, tokenizer: Tokenizer, config: Config, from_images: bool, order_ratio: float = 0.0
) -> Watch:
    with gpu:
        batch = {"image": zeros(B, 3, 32, 32)} if from_images else {"codes": zeros(B, N, dtype=torch.int32)}
        batch |= {
            "class_labels": integers(U),
            "class_rows": integers(B),
            "perturbation_uniforms": zeros(B, num_perturbation_uniforms(N)),
        }
        batch["order_uniforms"] = zeros(B, 1 + N)
        with Watch(BF16, F32) as watch:
            terms = training_step(
                model, tokenizer, batch, 0.5, config, Targets(config, tokenizer), order_ratio=order_ratio
            )
        assert terms.loss.dtype == F32
        assert terms.loss.requires_grad
    return watch


@pytest.mark.parametrize("perturb_mode", ["switch", "mask"])
def test_training_from_codes(
    gpu: FakeGpu, model: ReAR, tokenizer: Tokenizer, config: Config, perturb_mode: Any
) -> None:
    config.model.generator.perturb_mode = perturb_mode
    assert train(gpu, model, tokenizer, config, from_images=False).products == {BF16}


def test_training_in_random_orders(gpu: FakeGpu, model: ReAR, tokenizer: Tokenizer, config: Config) -> None:
    config.model.generator.order = "random"
    assert train(gpu, model, tokenizer, config, from_images=False, order_ratio=1.0).products == {BF16}


def test_training_from_images(gpu: FakeGpu, model: ReAR, tokenizer: Tokenizer, config: Config) -> None:
    assert train(gpu, model, tokenizer, config, from_images=True).products == {BF16, F32}  # the tokenizer's are exact


def test_the_outputs_of_the_model_under_autocast(gpu: FakeGpu, model: ReAR) -> None:
    """The residual stream and the norms are float32 for products of any type."""
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: streams.append(output.dtype))
    with gpu, torch.autocast("cuda", BF16), Watch(BF16, F32):
        output = model(integers(B, N), integers(B))
    assert [one.dtype for one in (output.logits, *output.projections.values())] == [BF16, BF16, BF16]
    assert streams == [F32, F32]


def sampler(gpu: FakeGpu, model: ReAR, config: Config, dtype: torch.dtype) -> tuple[CodeSampler, DecodingState]:
    """As after `start` with two distinct labels."""
    with gpu, torch.inference_mode():
        sample = CodeSampler(model.eval(), config.model.generator, dtype)
        state = DecodingState(sample.model, B, sample.guided, dtype)
        state.distinct_labels = integers(2)
    return sample, state


def decode(gpu: FakeGpu, state: DecodingState, masked: bool) -> tuple[Tensor, Watch]:
    with gpu, torch.inference_mode(), Watch(F32, state.dtype) as watch:
        return cached_decoding.decode_one_token(state, 32, masked), watch


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
class TestSampling:
    def test_modulations_and_prefill(
        self, gpu: FakeGpu, model: ReAR, config: Config, dtype: torch.dtype, guidance_scale: float
    ) -> None:
        config.model.generator.guidance_scale = guidance_scale
        _, state = sampler(gpu, model, config, dtype)
        with gpu, torch.inference_mode(), Watch(F32, dtype) as watch:
            for first in (0, 32, 64):
                state.fill_modulations(first)
            hidden = prefill(state)
        assert hidden.dtype == F32
        assert watch.products == {dtype}

    @pytest.mark.parametrize("masked", [False, True])
    def test_step(
        self,
        gpu: FakeGpu,
        model: ReAR,
        config: Config,
        dtype: torch.dtype,
        guidance_scale: float,
        masked: bool,
    ) -> None:
        config.model.generator.guidance_scale = guidance_scale
        sample, state = sampler(gpu, model, config, dtype)
        hidden, watch = decode(gpu, state, masked)
        assert hidden.dtype == F32
        assert watch.products == {dtype}
        assert state.caches[0].keys.dtype == state.caches[0].values.dtype == dtype
        with gpu, torch.inference_mode(), Watch(F32, F64) as watch:  # float64 in the cumulative sum
            sample_next_codes(hidden, state, sample.scales, config.model.generator)
        assert watch.products == {F32}
        with gpu, torch.inference_mode(), Watch(F32):
            assert state.codes_in_raster_order().shape == (B, N)


KINDS = (
    {"model_type": "maskgit_vq"},
    {"model_type": "llamagen_vq", "z_channels": 8},
    {"model_type": "taming_vqgan", "z_channels": 8},
    {"model_type": "vqplus"},
    {"model_type": "vqplus", "quantizer_type": "lookup-free", "codebook_size": 256},
)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer(gpu: FakeGpu, config: Config, kind: dict[str, Any]) -> None:
    tokenizer = gpu.put(build_tokenizer(replace(config.model.vq_model, **kind)).eval().requires_grad_(False))
    with gpu, Watch(F32):
        codes = tokenizer.quantize_latents(tokenizer.encode_latents(zeros(B, 3, 32, 32)))
        assert (codes.dtype, tuple(codes.shape)) == (torch.int64, (B, N))
        assert tokenizer._decode(codes).dtype == tokenizer.codebook_lookup(codes).dtype == F32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["truncate", "round"])
def test_image_decoder(gpu: FakeGpu, config: Config, rule: str, kind: dict[str, Any]) -> None:
    """Made on the CPU, as the one of a GPU has a stream; with chunks as there."""
    decoder = ImageDecoder(build_tokenizer(replace(config.model.vq_model, **kind)), rule, F16)
    decoder.chunk_size = 2
    for network, dtype in ((decoder.decoder, F16), (decoder.exact, F32)):
        gpu.put(network)
        with gpu, torch.inference_mode(), Watch(F32, dtype) as watch:
            images, finite, sampled = decoder._decode(integers(B, N), network)
        assert (images.dtype, tuple(images.shape)) == (torch.uint8, (B, 32, 32, 3))
        assert finite.dtype == sampled.dtype == torch.bool
        assert watch.products == {dtype}


def test_a_fast_decoder_is_made_on_the_gpu(gpu: FakeGpu, tokenizer: Tokenizer) -> None:
    with gpu, torch.inference_mode():
        decoder = tokenizer.fast_decoder()
        with Watch(F32):
            assert decoder(integers(B, N)).dtype == F32


def test_means_of_the_log(
    gpu: FakeGpu, model: ReAR, tokenizer: Tokenizer, config: Config, ctx: DistributedContext
) -> None:
    """Of what a training step measures, with and without the metrics that are ratios."""
    with gpu:
        batch = {"codes": integers(B, N), "class_labels": integers(U), "class_rows": integers(B)}
        batch["perturbation_uniforms"] = zeros(B, num_perturbation_uniforms(N))
        measured = training_step(model, tokenizer, batch, 0.5, config, Targets(config, tokenizer)).metrics
        means = IntervalMeans(ctx)
        with Watch(F32, F64):
            for metrics in (measured, {"train/loss": zeros()}):
                means.add([metrics, metrics], zeros())
        assert means._sums.dtype == F64


def test_validation_losses(gpu: FakeGpu, model: ReAR) -> None:
    with gpu, torch.no_grad(), torch.autocast("cuda", BF16):
        codes = zeros(B, N, dtype=torch.int32)
        with Watch(BF16, F32, F64) as watch:
            sums = batch_sums(model.eval(), ValidationTokens(codes, codes, integers(B)), slice(0, 2))
    assert (sums.dtype, tuple(sums.shape)) == (F64, (N + 2,))
    assert watch.products == {BF16}


def test_inception(gpu: FakeGpu, tmp_path: Path) -> None:
    shapes = {key: shape for key, shape in inception_shapes().items() if not key.endswith("num_batches_tracked")}
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "inception.pth")
    inception = Inception(torch.device("cpu"), tmp_path / "inception.pth")
    gpu.put(inception.network)
    inception.classifier = gpu.like(inception.classifier)
    with gpu, torch.inference_mode():
        features = inception(zeros(B, 64, 64, 3, dtype=torch.uint8))  # its resize multiplies by numbers from the CPU
    assert (features.pool.dtype, features.spatial.dtype, features.log_probs.dtype) == (F32, F32, F64)


def test_statistics(gpu: FakeGpu) -> None:
    with gpu, torch.inference_mode():
        moments, score = Moments(20, torch.device("cuda")), ScoreSums(5001, 10, torch.device("cuda"))
        with Watch(F32, F64) as watch:
            moments.update(zeros(B, 20))
            score.update(4999, zeros(B, 10, dtype=F64))
    assert {moments.total.dtype, moments.outer.dtype, score.probs.dtype} == {F64}
    assert watch.products == {F64}


def test_efficientnet(gpu: FakeGpu) -> None:
    extractor = EncoderFeatures("efficientnet_lite0", torch.device("cpu"))
    gpu.put(extractor.encoder)
    with gpu, torch.inference_mode(), Watch(F32) as watch:
        assert extractor(zeros(B, 64, 64, 3, dtype=torch.uint8)).pool.dtype == F32
    assert watch.products == {F32}


@pytest.mark.parametrize("dtype", [F16, F32])
def test_precision_and_recall(
    gpu: FakeGpu, ctx: DistributedContext, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for their range, which is looked at once, and the reading of the two numbers."""
    monkeypatch.setattr(precision_recall_module, "_check_range", lambda reference, samples: None)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: tensor)
    with gpu, Watch(F16, F32, F64) as watch:
        reference, samples = (zeros(count, 2048, dtype=dtype) for count in (7, 501))
        assert manifold_radii(reference, ctx).dtype == F32
        assert [share.dtype for share in precision_recall(reference, samples, ctx)] == [F64, F64]
    assert watch.products == {F32}
