import numpy as np
import torch

from utils.randomness import (
    Stream,
    dropout_seed,
    image_uniforms,
    permutation,
    philox,
    sample_uniforms,
    uniforms,
    validation_uniforms,
)


def test_golden_values() -> None:
    """Other numbers would change running trainings and published samples: on every version of NumPy the same."""
    assert uniforms(philox(Stream.SAMPLING, 3, 4), 3).tolist() == [
        0.2365416296134677,
        0.8460626445297484,
        0.24064143887619815,
    ]
    assert permutation(philox(Stream.DATA_ORDER, 42, 0), 10).tolist() == [0, 2, 6, 9, 3, 5, 4, 8, 7, 1]
    assert sample_uniforms(1, 7, [2], 3).tolist() == [[0.3248571753501892, 0.715986967086792, 0.21479520201683044]]
    assert image_uniforms(1, [5], 3).tolist() == [[0.661202609539032, 0.7313018441200256, 0.14237354695796967]]
    assert validation_uniforms([5], 3).tolist() == [[0.03058953955769539, 0.0728803277015686, 0.1296616792678833]]
    assert sample_uniforms(1, 7, [2], 2, Stream.TRAINING_ORDERS).tolist() == [[0.5163296461105347, 0.6598489880561829]]
    assert image_uniforms(1, [5], 2, Stream.SAMPLING_ORDERS).tolist() == [[0.1532272845506668, 0.227020725607872]]
    assert dropout_seed(1, 2, 3, 4) == 7661749924751933381


def test_a_permutation_holds_every_number_once() -> None:
    order = permutation(philox(Stream.DATA_ORDER, 0, 0), 1000)
    assert order.dtype == np.uint32
    assert sorted(order) == list(range(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_uniforms_are_those_of_numpys_generator() -> None:
    numpys = np.random.Generator(philox(Stream.SAMPLING, 3, 4)).random(1000)
    np.testing.assert_array_equal(uniforms(philox(Stream.SAMPLING, 3, 4), 1000), numpys)


def test_sample_uniforms_do_not_depend_on_how_the_batch_is_cut() -> None:
    whole = sample_uniforms(1, 7, range(12), 34)
    for places in ([0, 1, 2], [11, 4], [7]):
        assert torch.equal(sample_uniforms(1, 7, places, 34), whole[places])
    assert len(whole.unique()) > 400
    assert not torch.equal(whole, sample_uniforms(1, 8, range(12), 34))
    assert not torch.equal(whole, sample_uniforms(2, 7, range(12), 34))


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
