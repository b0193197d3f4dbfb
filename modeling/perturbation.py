"""Perturbation of the context in training: some input codes are replaced, the targets stay.

Source: the paper's noisy context regularization (https://arxiv.org/abs/2510.04450, section 3). A new perturbation is a
function like `switch_codes` of `modeling.robust_embedding`, a line in `PERTURBATIONS`, and its name among the choices
of `model.generator.perturb_mode`.

Legend: B images, N codes per image, V codebook size. Random numbers are passed in as uniforms in [0, 1).
"""

import torch
from torch import Tensor

from modeling.robust_embedding import Perturbation, anneal, mask_codes, switch_codes
from modeling.robust_embedding import num_perturbation_uniforms as num_perturbation_uniforms
from modeling.robust_embedding import perturbation_mask as perturbation_mask  # for a new perturbation
from utils.schema import GeneratorConfig, ModelConfig


def keep_codes(codes: Tensor, uniforms: Tensor, max_ratio: float, codebook_size: int) -> tuple[Tensor, Tensor]:
    """No perturbation: the plain AR model."""
    return codes, torch.zeros_like(codes, dtype=torch.bool)


PERTURBATIONS: dict[str, Perturbation] = {"switch": switch_codes, "mask": mask_codes, "none": keep_codes}


def perturb(codes: Tensor, uniforms: Tensor, max_ratio: float, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Apply the perturbation of `perturb_mode`.

    Args:
        codes: (B, N) int.
        uniforms: (B, 2 N + 1).
        max_ratio: largest perturbation ratio of an image, in [0, 1]; see `perturbation_ratio`.

    Returns:
        perturbed codes (B, N) int, and the perturbation mask (B, N) bool, true where a code was replaced.
    """
    if config.generator.perturb_ratio_fixed:
        uniforms = torch.cat([torch.ones_like(uniforms[:, :1]), uniforms[:, 1:]], dim=1)
    return PERTURBATIONS[config.generator.perturb_mode](codes, uniforms, max_ratio, config.vq_model.codebook_size)


def perturbation_ratio(step: int, generator: GeneratorConfig) -> float:
    """Largest perturbation ratio at a step: `perturb_ratio_max`, annealed; 0 for the plain AR model."""
    if generator.perturb_mode == "none":
        return 0.0
    ratio = anneal(step, generator.randomness_anneal_start, generator.randomness_anneal_end)
    return generator.perturb_ratio_max * ratio
