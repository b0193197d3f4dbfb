"""Precision and recall of Kynkaanniemi et al. 2019 (https://arxiv.org/abs/1904.06991), as in the ADM evaluator.

Its TensorFlow graph computes the distances in float16, which adds about 0.001 to precision and 0.002 to recall.
float16 features (`tf-fp16`) reproduce that, including the rounding; float32 features (`fp32`) give the exact metric.

Legend: N, M images; D feature width. Distances are squared.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.precision import matmul_precision

NEIGHBOURS = 3
# Rows and columns of a block of distances. Blocks, and so rounding, do not depend on the number of processes.
BLOCK_ROWS, BLOCK_COLUMNS = 500, 10_000
TF_HALVES, TF_STEPS, TF_ACCUMULATORS, TF_LANES = 2, 32, 4, 8  # TensorFlow's order of summation on a CPU, D = 2048
FEATURE_DTYPES = {"tf-fp16": torch.float16, "fp32": torch.float32}


def squared_norms(features: Tensor) -> Tensor:
    """|x|^2 of the rows of (N, D), in their dtype; float16 is summed in TensorFlow's order and needs D = 2048."""
    if features.dtype == torch.float32:
        return features.square().sum(1)
    norms = []
    for rows in features.split(BLOCK_COLUMNS):
        # (N, 2048) -> (N, 2, 32, 4, 8); every addition rounds to float16 except the last sum over lanes
        squares = rows.square().reshape(-1, TF_HALVES, TF_STEPS, TF_ACCUMULATORS, TF_LANES)
        accumulators = _add_in_sequence(squares, dim=2)  # (N, 2, 4, 8)
        lanes = _add_in_sequence(accumulators, dim=2)  # (N, 2, 8)
        halves = lanes.float().sum(2).half()  # (N, 2)
        norms.append(halves[:, 0] + halves[:, 1])
    return torch.cat(norms)


def _add_in_sequence(x: Tensor, dim: int) -> Tensor:
    total, *rest = x.unbind(dim)
    for term in rest:
        total = total + term
    return total


def squared_distances(u: Tensor, v: Tensor, norms_u: Tensor, norms_v: Tensor) -> Tensor:
    """(N, M) float32 from u (N, D) and v (M, D): |u|^2 - 2uv + |v|^2, rounded to the dtype of u at each step."""
    products = (u.float() @ v.float().T).to(u.dtype)  # accumulated in float32 for both dtypes
    return ((norms_u[:, None] - 2 * products) + norms_v).clamp_min(0).float()


def _row_blocks(count: int, ctx: DistributedContext, title: str) -> Iterator[slice]:
    """Blocks of rows of this process."""
    starts = range(ctx.rank * BLOCK_ROWS, count, ctx.size * BLOCK_ROWS)
    for start in tqdm(starts, desc=title, unit="block", disable=not ctx.is_rank0):
        yield slice(start, start + BLOCK_ROWS)


def _column_blocks(count: int) -> list[slice]:
    return [slice(start, start + BLOCK_COLUMNS) for start in range(0, count, BLOCK_COLUMNS)]


def manifold_radii(features: Tensor, ctx: DistributedContext, title: str = "radii") -> Tensor:
    """Squared distance of each row of (N, D) to its third neighbour, (N,) float32."""
    norms = squared_norms(features)
    radii = torch.zeros(len(features), device=features.device)
    for rows in _row_blocks(len(features), ctx, title):
        nearest = torch.empty(len(features[rows]), 0, device=features.device)
        for columns in _column_blocks(len(features)):
            distances = squared_distances(features[rows], features[columns], norms[rows], norms[columns])
            candidates = torch.cat([nearest, distances], 1)
            nearest = candidates.topk(min(NEIGHBOURS + 1, candidates.shape[1]), largest=False).values
        radii[rows] = nearest.amax(1)  # the fourth smallest: a row is its own nearest
    return ctx.all_reduce_sum(radii)


@matmul_precision(tf32=False)
def precision_recall(reference: Tensor, samples: Tensor, ctx: DistributedContext) -> tuple[float, float]:
    """Share of the samples inside a ball of the reference, and of the reference inside a ball of the samples.

    Args:
        reference, samples: (N, D) and (M, D), both float16 with D = 2048 or both float32; equal on every process.

    Raises:
        InputError: float16 cannot hold the distances.
    """
    ctx.rank0_first(lambda: _check_range(reference, samples))
    reference_radii = manifold_radii(reference, ctx, "radii of the reference")
    sample_radii = manifold_radii(samples, ctx, "radii of the samples")
    reference_norms, sample_norms = squared_norms(reference), squared_norms(samples)
    reference_inside = torch.zeros(len(reference), dtype=torch.int32, device=reference.device)
    samples_inside = torch.zeros(len(samples), dtype=torch.int32, device=reference.device)
    for rows in _row_blocks(len(reference), ctx, "precision and recall"):
        for columns in _column_blocks(len(samples)):
            distances = squared_distances(
                reference[rows], samples[columns], reference_norms[rows], sample_norms[columns]
            )
            reference_inside[rows] |= (distances <= sample_radii[columns]).any(1)
            samples_inside[columns] |= (distances <= reference_radii[rows, None]).any(0)
    precision = (ctx.all_reduce_sum(samples_inside) > 0).double().mean().item()
    recall = (ctx.all_reduce_sum(reference_inside) > 0).double().mean().item()
    return precision, recall


def _check_range(reference: Tensor, samples: Tensor) -> None:
    """The original switches to float32 for a block of 10,000 x 10,000 if float16 overflows; here it is an error."""
    largest = 2 * max(squared_norms(x).amax().item() for x in (reference, samples))  # no distance is larger
    if not largest <= torch.finfo(reference.dtype).max:
        raise InputError(f"features: squared distances up to {largest:g} overflow float16; use --distance fp32")
