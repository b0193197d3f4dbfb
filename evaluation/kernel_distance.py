"""Kernel distance of features: with Inception's, KID (https://arxiv.org/abs/1801.01401).

The squared maximum mean discrepancy of the kernel (x y / D + 1)^3, D features: 0 for equal distributions. The estimate
is unbiased at any number of images, so it may be negative. The implementation is torch-fidelity's.
"""

from dataclasses import dataclass

from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000  # as published; random subsets, the same ones in every run


@dataclass(frozen=True)
class KernelDistance:
    """Kernel distance over random subsets of the images."""

    mean: float
    std: float  # standard deviation, of the values of single subsets


def kernel_distance(reference: Tensor, samples: Tensor) -> KernelDistance:
    """Kernel distance of features (N, D) and (M, D), float32; subsets have 1,000 images each, or half of the smaller
    set if it has less than 2,000 images."""
    from torch_fidelity.metric_kid import (  # a slow import
        KEY_METRIC_KID_MEAN,
        KEY_METRIC_KID_STD,
        kid_features_to_metric,
    )

    size = min(SUBSET_SIZE, min(len(reference), len(samples)) // 2)
    found = kid_features_to_metric(reference, samples, kid_subsets=SUBSETS, kid_subset_size=size, verbose=False)
    return KernelDistance(mean=found[KEY_METRIC_KID_MEAN], std=found[KEY_METRIC_KID_STD])
