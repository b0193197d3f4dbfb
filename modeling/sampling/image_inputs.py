"""What sampling starts from: image i of all images that a seed gives has its class, random numbers and order."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modeling.orders import ORDERS
from modeling.rear import ReAR
from utils.randomness import Stream, image_uniforms
from utils.schema import SamplingConfig


def class_labels_of(indices: Sequence[int], num_classes: int) -> np.ndarray:
    """Class labels (B,) int64 of images: i mod C, so that classes take turns and no part of the images lacks one."""
    return np.asarray(indices, np.int64) % num_classes


def indices_of_classes(class_labels: Sequence[int], count: int, num_classes: int) -> list[int]:
    """Indices of `count` images, in which these classes take turns, each from its first image on. Of all classes in
    their order that is 0, 1, 2, ...

    Raises:
        ValueError: a class label that is not 0 to C - 1; the null class has no images.
    """
    for class_label in class_labels:
        if class_label not in range(num_classes):
            raise ValueError(f"class label {class_label}: expected 0 to {num_classes - 1}")
    turns = (divmod(place, len(class_labels)) for place in range(count))
    return [class_labels[which] + turn * num_classes for turn, which in turns]


def asked_images(sampling: SamplingConfig, class_labels: Sequence[int], num_classes: int) -> list[int]:
    """Indices of the images that `sampling` asks for.

    Args:
        class_labels: the ids of `sampling.class_labels`.
    """
    count, per_class = sampling.num_fid_samples, sampling.images_per_class
    return indices_of_classes(class_labels, per_class * len(class_labels) if per_class else count, num_classes)


def image_inputs(indices: Sequence[int], model: ReAR, seed: int) -> tuple[Tensor, Tensor]:
    """Class labels (B,) int64 and uniforms (B, N) of the images with these indices, on the CPU."""
    class_labels = torch.from_numpy(class_labels_of(indices, model.num_classes))
    return class_labels, image_uniforms(seed, list(indices), model.image_seq_len)


def image_orders(indices: Sequence[int], image_seq_len: int, sampling: SamplingConfig) -> Tensor | None:
    """Orders (B, N) int64 of the images with these indices, on the CPU; None: raster."""
    if sampling.order == "raster":
        return None
    uniforms = image_uniforms(sampling.seed, list(indices), image_seq_len, Stream.SAMPLING_ORDERS)
    return ORDERS[sampling.order](uniforms)
