"""Whether rounding explains that two ways of sampling chose different codes.

A code is chosen where a uniform falls in the cumulative distribution. Two ways that round differently part where it
falls next to an edge, at one code of several thousand, and then go on from different prefixes. So of each image only
the first difference is looked at: there the uniform must lie at the edge.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.rear import ReAR
from modeling.sampling.generate import are_codes, guidance_schedule, guide
from utils.schema import GeneratorConfig

# Largest gap that is a close call. At the sizes of reAR-B on a CPU, errors of the cumulative distribution reached
# 3e-6 between two ways in float32, and 6e-3 in bf16.
FLOAT32_GAP, BFLOAT16_GAP = 1e-4, 0.05


@torch.inference_mode()
def largest_gap(
    model: ReAR, class_labels: Tensor, uniforms: Tensor, codes: Tensor, others: Tensor, config: GeneratorConfig
) -> float:
    """Distance of the uniform from the interval of either code at the first difference of an image, by the model's
    forward pass; the largest of all images, 0 where all codes (B, N) are equal. Without top-k and top-p."""
    if not (are_codes(codes, model.codebook_size) and are_codes(others, model.codebook_size)):
        return float("inf")
    images = (codes != others).any(dim=1).nonzero()[:, 0]  # (b,)
    if len(images) == 0:
        return 0.0
    codes, others = codes[images], others[images]
    labels, uniforms = class_labels.to(codes.device)[images], uniforms.to(codes.device)[images]
    rows, first = torch.arange(len(images), device=codes.device), (codes != others).int().argmax(dim=1)
    scales = guidance_schedule(config.guidance_scale, config.guidance_scale_pow, model.image_seq_len)
    cond, uncond = (
        model(codes, of_class).logits[rows, first] for of_class in (labels, torch.full_like(labels, model.null_class))
    )  # each (b, V)
    logits = guide(cond, uncond, torch.tensor(scales, device=codes.device)[first, None]) / config.randomize_temperature
    edges = F.pad(logits.softmax(dim=-1).double().cumsum(dim=-1), (1, 0))  # (b, V + 1)
    uniform, gaps = uniforms[rows, first], []
    for chosen in (codes[rows, first], others[rows, first]):
        gaps.append(torch.maximum(edges[rows, chosen] - uniform, uniform - edges[rows, chosen + 1]))
    return torch.stack(gaps).max().clamp(min=0).item()
