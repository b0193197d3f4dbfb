import numpy as np
import torch

from modeling.rear import ReAR
from modeling.sampling.image_inputs import class_labels_of, image_inputs, indices_of_class
from utils.randomness import image_uniforms


def test_classes_take_turns() -> None:
    labels = class_labels_of(range(12), num_classes=5)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    for class_label in range(5):
        indices = indices_of_class(class_label, 2, num_classes=5)
        assert class_labels_of(indices, 5).tolist() == [class_label] * 2
        assert indices == np.flatnonzero(labels == class_label)[:2].tolist()


def test_an_images_inputs_do_not_depend_on_the_others(tiny_model: ReAR) -> None:
    labels, uniforms = image_inputs([7, 3], tiny_model, seed=9)
    assert labels.tolist() == [2, 3]
    assert labels.dtype == torch.int64
    assert torch.equal(uniforms, image_uniforms(9, [7, 3], 16))
    assert torch.equal(image_inputs([3], tiny_model, seed=9)[1], uniforms[1:])
