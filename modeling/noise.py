"""The noisy context of training: codes of the context are replaced, at random and less and less as training goes on.

Source: the paper's noisy context regularization (https://arxiv.org/abs/2510.04450, section 3). A new noise is a
function like those of `modeling.robust_embedding`, a line in `NOISES`, and its name among the choices of
`model.generator.perturb_mode`. The random orders of `modeling.orders` fade in the same way.

Legend: B images, N codes per image, V codebook size. Random numbers come in as uniforms in [0, 1), so that a result
depends on its arguments only.
"""

import torch
from torch import Tensor

from modeling.robust_embedding import Noise, mask_codes, perturbation_ratio_at, switch_codes
from modeling.robust_embedding import codes_to_replace as codes_to_replace  # for a new noise
from modeling.robust_embedding import num_noise_uniforms as num_noise_uniforms  # part of every noise
from utils.schema import GeneratorConfig, ModelConfig


def keep_codes(codes: Tensor, uniforms: Tensor, max_ratio: float, codebook_size: int) -> tuple[Tensor, Tensor]:
    """No noise: the plain AR model."""
    return codes, torch.zeros_like(codes, dtype=torch.bool)


NOISES: dict[str, Noise] = {"switch": switch_codes, "mask": mask_codes, "none": keep_codes}


def add_noise(codes: Tensor, uniforms: Tensor, max_ratio: float, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The noise of `perturb_mode`.

    Args:
        codes: (B, N) int.
        uniforms: (B, 2 N + 1).
        max_ratio: f(t) in [0, 1], as `perturbation_ratio` gives it.

    Returns:
        perturbed_codes: (B, N) int.
        perturbation_mask: (B, N) bool, true where a code was replaced.
    """
    if config.generator.perturb_ratio_fixed:
        uniforms = torch.cat([torch.ones_like(uniforms[:, :1]), uniforms[:, 1:]], dim=1)
    return NOISES[config.generator.perturb_mode](codes, uniforms, max_ratio, config.vq_model.codebook_size)


def perturbation_ratio(step: int, generator: GeneratorConfig) -> float:
    """`perturbation_ratio_at` as the config says, times `perturb_ratio_max`; 0 for the plain AR model."""
    if generator.perturb_mode == "none":
        return 0.0
    ratio = perturbation_ratio_at(step, generator.randomness_anneal_start, generator.randomness_anneal_end)
    return generator.perturb_ratio_max * ratio


def random_order_ratio(step: int, generator: GeneratorConfig) -> float:
    """Share of the samples that are not in raster order: `perturbation_ratio_at` for `order=annealed`, else 0 or 1."""
    if generator.order == "annealed":
        return perturbation_ratio_at(step, generator.order_anneal_start, generator.order_anneal_end)
    return float(generator.order != "raster")
