"""Whether rounding explains that two sampling methods chose different codes.

A code is chosen by the position of a uniform in the cumulative distribution. Two methods that round differently choose
different codes where the uniform is next to an edge, about once in several thousand codes, and then continue from
different prefixes. So only the first difference of each image is checked: there the uniform must be at the edge.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.rear import ReAR
from modeling.sampling.generate import guidance_schedule, guide
from utils.schema import GeneratorConfig

# Largest distance from an edge that rounding explains. Measured at the sizes of reAR-B on a CPU: the cumulative
# distributions of two methods differ by up to 3e-6 in float32 and 6e-3 in bf16.
FLOAT32_GAP, BFLOAT16_GAP = 1e-4, 0.05


@torch.inference_mode()
def largest_gap(
    model: ReAR, class_labels: Tensor, uniforms: Tensor, codes: Tensor, others: Tensor, config: GeneratorConfig
) -> float:
    """Largest distance, over the images, of the uniform from the interval of either code at the first difference
    between `codes` and `others` (B, N), by the model's forward pass; 0 if all codes are equal, infinity if one is not
    in the codebook. Without top-k and top-p."""
    for tokens in (codes, others):
        if ((tokens < 0) | (tokens >= model.codebook_size)).any():
            return float("inf")
    images = (codes != others).any(dim=1).nonzero()[:, 0]  # (b,)
    if len(images) == 0:
        return 0.0
    codes, others = codes[images], others[images]
    labels, uniforms = class_labels.to(codes.device)[images], uniforms.to(codes.device)[images]
    rows, first = torch.arange(len(images), device=codes.device), (codes != others).int().argmax(dim=1)
    scales = guidance_schedule(config.guidance_scale, config.guidance_scale_pow, model.image_seq_len)
    cond = model(codes, labels).logits[rows, first]  # (b, V)
    uncond = model(codes, torch.full_like(labels, model.null_class)).logits[rows, first]
    logits = guide(cond, uncond, torch.tensor(scales, device=codes.device)[first, None]) / config.randomize_temperature
    edges = F.pad(logits.softmax(dim=-1).double().cumsum(dim=-1), (1, 0))  # (b, V + 1)
    uniform, gaps = uniforms[rows, first], []
    for chosen in (codes[rows, first], others[rows, first]):
        gaps.append(torch.maximum(edges[rows, chosen] - uniform, uniform - edges[rows, chosen + 1]))
    return torch.stack(gaps).max().clamp(min=0).item()
