import dataclasses

import pytest
import torch

from modeling.generate import filter_logits, generate, guidance_schedule, guide, sample_codes
from modeling.rear import ReAR
from utils.randomness import image_uniforms
from utils.schema import ModelConfig


def recompute(model: ReAR, labels: torch.Tensor, uniforms: torch.Tensor, config) -> torch.Tensor:
    """The slow road: the whole prefix through the training forward for every code."""
    codes = torch.zeros(len(labels), model.image_seq_len, dtype=torch.long)
    scales = guidance_schedule(config.guidance_scale, config.guidance_scale_pow, model.image_seq_len)
    for k in range(model.image_seq_len):
        with torch.no_grad():
            cond = model(codes, labels).logits[:, k]
            uncond = model(codes, torch.full_like(labels, model.num_classes)).logits[:, k]
        codes[:, k] = sample_codes(guide(cond, uncond, scales[k]) / config.randomize_temperature, uniforms[:, k])
    return codes


def test_cached_decoding_equals_recomputation(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    labels = torch.tensor([0, 1, 4, 4])
    for seed in range(3):
        uniforms = image_uniforms(seed, [0, 1, 2, 3], 16)
        fast = generate(tiny_model, labels, uniforms, tiny_config.generator)
        assert torch.equal(fast, recompute(tiny_model, labels, uniforms, tiny_config.generator))
        assert len(fast.unique()) > 5


def test_guidance_one_equals_the_conditional_stream_alone(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    labels, uniforms = torch.tensor([3, 2]), image_uniforms(0, [0, 1], 16)
    config = dataclasses.replace(tiny_config.generator, guidance_scale=1.0)
    fast = generate(tiny_model, labels, uniforms, config)
    assert torch.equal(fast, recompute(tiny_model, labels, uniforms, config))


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_an_image_does_not_depend_on_its_batch(tiny_model: ReAR, tiny_config: ModelConfig, batch_size: int) -> None:
    def sample(indices: list[int]) -> torch.Tensor:
        labels = torch.tensor(indices) % 5
        return generate(tiny_model, labels, image_uniforms(9, indices, 16), tiny_config.generator)

    together = sample(list(range(64)))
    pieces = [sample(list(range(i, min(i + batch_size, 64)))) for i in range(0, 64, batch_size)]
    assert torch.equal(torch.cat(pieces), together)


def test_guidance_schedule_by_hand() -> None:
    # N = 4, g = 5, pow = 1: (1 - cos(pi k / 4)) / 2 = 0, 0.1464, 0.5, 0.8536
    assert guidance_schedule(5.0, 1.0, 4) == pytest.approx([1.0, 1.5858, 3.0, 4.4142], abs=1e-4)
    assert guidance_schedule(1.0, 2.5, 8) == [1.0] * 8
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 2.0) == 5.0


def test_sample_codes_follow_the_distribution() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.7]]).log().expand(4, -1)
    assert sample_codes(logits, torch.tensor([0.0, 0.099, 0.101, 0.31])).tolist() == [0, 0, 1, 3]
    largest = torch.full((4,), 1 - 2**-24)
    assert sample_codes(torch.randn(4, 1000), largest).max() <= 999
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    counts = sample_codes(logits[:1].expand(20000, -1), uniforms).bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.0, 0.7]), atol=0.02, rtol=0)


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert filter_logits(logits, 2, 1.0).isfinite().tolist() == [[False, True, False, True]]
    assert filter_logits(logits, 0, 0.65).isfinite().tolist() == [[False, True, False, True]]
    assert filter_logits(logits, 0, 0.75).isfinite().tolist() == [[False, True, True, True]]
    assert filter_logits(logits, 0, 1e-9).isfinite().sum() == 1
    assert torch.equal(filter_logits(logits, 0, 1.0), logits)
