import torch

from utils.randomness import dropout_seed, image_uniforms, sample_uniforms


def test_sample_uniforms_do_not_depend_on_how_the_batch_is_cut() -> None:
    whole = sample_uniforms(1, 7, 0, 12, 34)
    pieces = [sample_uniforms(1, 7, first, 3, 34) for first in (0, 3, 6, 9)]
    assert torch.equal(torch.cat(pieces), whole)
    assert len(whole.unique()) > 400
    assert not torch.equal(whole, sample_uniforms(1, 8, 0, 12, 34))
    assert not torch.equal(whole, sample_uniforms(2, 7, 0, 12, 34))


def test_image_uniforms_depend_on_seed_and_index_only() -> None:
    many = image_uniforms(3, [4, 0, 9], 50)
    assert torch.equal(many[1:2], image_uniforms(3, [0], 50))
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(many, image_uniforms(4, [4, 0, 9], 50))
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(image_uniforms(0, list(range(200)), 64).mean() - 0.5) < 0.01


def test_dropout_seeds_differ() -> None:
    seeds = {dropout_seed(s, t, m, r) for s in range(3) for t in range(5) for m in range(2) for r in range(2)}
    assert len(seeds) == 60
