"""The noisy context of training: codes of the context are replaced, at random and less and less as training goes on.

Source: the paper's noisy context regularization (https://arxiv.org/abs/2510.04450, section 3). A new noise is a
function like those below, a line in `NOISES`, and its name among the choices of `model.generator.perturb_mode`. The
random orders of `modeling.orders` fade in the same way.

Legend: B images, N codes per image, V codebook size. Random numbers come in as uniforms in [0, 1), so that a result
depends on its arguments only.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from utils.schema import GeneratorConfig, ModelConfig

# (codes (B, N), uniforms (B, 2 N + 1), largest ratio, V) -> (noisy codes (B, N), bool mask (B, N) of replaced ones)
Noise = Callable[[Tensor, Tensor, float, int], tuple[Tensor, Tensor]]


def num_noise_uniforms(image_seq_len: int) -> int:
    """Uniforms of each sequence: one for its ratio, N that choose codes, N for what replaces them."""
    return 2 * image_seq_len + 1


def switch_codes(codes: Tensor, uniforms: Tensor, max_ratio: float, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Replace chosen codes by random ones of the whole codebook, so a new code may be the old one."""
    mask = codes_to_replace(uniforms, max_ratio)
    replacement = (uniforms[:, 1 + codes.shape[1] :] * codebook_size).to(codes.dtype)
    return torch.where(mask, replacement, codes), mask


def mask_codes(codes: Tensor, uniforms: Tensor, max_ratio: float, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Replace chosen codes by the mask, which stands behind the codebook (`ReAR.mask_code`)."""
    mask = codes_to_replace(uniforms, max_ratio)
    return torch.where(mask, codebook_size, codes), mask


def keep_codes(codes: Tensor, uniforms: Tensor, max_ratio: float, codebook_size: int) -> tuple[Tensor, Tensor]:
    """No noise: the plain AR model."""
    return codes, torch.zeros_like(codes, dtype=torch.bool)


NOISES: dict[str, Noise] = {"switch": switch_codes, "mask": mask_codes, "none": keep_codes}


def codes_to_replace(uniforms: Tensor, max_ratio: float) -> Tensor:
    """Mask (B, N) of the codes to replace; each sequence draws from U(0, max_ratio) how probable that is for its codes.

    Args:
        uniforms: (B, 2 N + 1), of which the ratio is the first and the choices are the next N.
    """
    image_seq_len = uniforms.shape[1] // 2
    ratio, choice = uniforms[:, :1], uniforms[:, 1 : 1 + image_seq_len]
    return choice < ratio * max_ratio


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


def perturbation_ratio_at(step: int, anneal_start: int, anneal_end: int) -> float:
    """Largest share of codes that are replaced: 1 until `anneal_start`, linear to 0 at `anneal_end`, 0 after.

    With 0 and 3/4 of the steps it is the paper's f(t) = max(0, 1 - 4t/3).
    """
    if step >= anneal_end:
        return 0.0
    return min(1.0, (anneal_end - step) / max(1, anneal_end - anneal_start))


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
