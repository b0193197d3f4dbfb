import numpy as np
import torch

from modeling.orders import random_orders
from modeling.rear import ReAR
from modeling.sampling.image_inputs import (
    asked_images,
    class_labels_of,
    image_inputs,
    image_orders,
    indices_of_classes,
)
from utils.randomness import Stream, image_uniforms
from utils.schema import SamplingConfig


def test_classes_take_turns() -> None:
    labels = class_labels_of(range(12), num_classes=5)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert indices_of_classes(range(5), 12, num_classes=5) == list(range(12))
    indices = indices_of_classes([4, 1], 5, num_classes=5)
    assert class_labels_of(indices, 5).tolist() == [4, 1, 4, 1, 4]
    for class_label in (1, 4):
        of_class = [index for index in indices if index % 5 == class_label]
        assert of_class == np.flatnonzero(class_labels_of(range(20), 5) == class_label)[: len(of_class)].tolist()


def test_so_many_in_all_or_of_each_class() -> None:
    assert asked_images(SamplingConfig(num_fid_samples=3), [4, 1], 5) == [4, 1, 9]
    assert asked_images(SamplingConfig(images_per_class=2), [4, 1], 5) == [4, 1, 9, 6]


def test_an_images_inputs_do_not_depend_on_the_others(tiny_model: ReAR) -> None:
    labels, uniforms = image_inputs([7, 3], tiny_model, seed=9)
    assert labels.tolist() == [2, 3]
    assert labels.dtype == torch.int64
    assert torch.equal(uniforms, image_uniforms(9, [7, 3], 16))
    assert torch.equal(image_inputs([3], tiny_model, seed=9)[1], uniforms[1:])


def test_orders_are_those_of_seed_and_index() -> None:
    sampling = SamplingConfig(seed=9, order="random")
    orders = image_orders([7, 3], 16, sampling)
    assert torch.equal(orders, random_orders(image_uniforms(9, [7, 3], 16, Stream.SAMPLING_ORDERS)))
    assert torch.equal(image_orders([3], 16, sampling), orders[1:])
    assert not torch.equal(orders, random_orders(image_uniforms(9, [7, 3], 16)))  # the numbers that choose the codes
    assert image_orders([3], 16, SamplingConfig()) is None
