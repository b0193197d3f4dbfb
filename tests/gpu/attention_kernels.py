"""Prints which kernel torch chooses for each attention of training and decoding, as JSON {case: kernel}.

Started by `test_attention_kernels.py` with `driver.c` in place of the driver. The tensors are the product's own,
without values; torch's choice looks at shapes, strides, types and the kind of GPU only.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes

from modeling.rear import ReAR
from modeling.sampling.cached_decoding import DecodingState, decode_one_token
from tests.gpu.fake_gpu import FakeGpu, attention
from utils.config import ROOT, load_config
from utils.precision import exact_attention_dropout

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> str:
    """What `scaled_dot_product_attention` would choose on a GPU."""
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    choose = torch.ops.aten._fused_sdp_choice.default
    with _disable_current_modes():  # the tensors stay fake
        chosen = choose.redispatch(CUDA, query, key, value, mask, dropout_p, is_causal, scale=scale)
    return SDPBackend(chosen).name.removesuffix("_ATTENTION").lower()


@contextmanager
def recorded(kernels: list[str]) -> Iterator[None]:
    def record(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        kernels.append(kernel(query, key, value, mask, **options))
        return attention(query, key, value, mask)

    with mock.patch.object(F, "scaled_dot_product_attention", record):
        yield


def training(model: ReAR) -> None:
    codes, labels = (torch.empty(size, dtype=torch.int64, device="cuda") for size in ((128, 256), 128))
    with torch.no_grad(), exact_attention_dropout(), torch.autocast("cuda", torch.bfloat16):
        model.train()(codes, labels)


def decoding(model: ReAR, dtype: torch.dtype, masked: bool) -> None:
    with torch.inference_mode():
        state = DecodingState(model.eval(), images=128, guided=True, dtype=dtype)
        for end in (16, 144, 256) if masked else (3, 144, 257):
            decode_one_token(state, end, masked)


def cases() -> dict[str, str]:
    """Kernels by case; several if the models or lengths have different ones."""
    found: dict[str, list[str]] = {}
    gpu = FakeGpu()
    for name in ("s", "b", "l"):
        config = load_config([f"config={ROOT}/configs/rear_{name}.yaml", "experiment.output_dir=unused"])
        config.model.generator.num_hidden_layers = 1
        config.model.generator.encode_align_layer_idx = config.model.generator.decode_align_layer_idx = 0
        model = gpu.put(ReAR(config.model))
        runs = {
            "training, bf16": partial(training, model),
            "decoding in a CUDA graph, bf16": partial(decoding, model, torch.bfloat16, masked=True),
            "decoding without a graph, bf16": partial(decoding, model, torch.bfloat16, masked=False),
            "decoding in a CUDA graph, float32": partial(decoding, model, torch.float32, masked=True),
            "decoding without a graph, float32": partial(decoding, model, torch.float32, masked=False),
        }
        for case, run in runs.items():
            with gpu, recorded(found.setdefault(case, [])):
                run()
    return {case: " ".join(sorted(set(kernels))) for case, kernels in found.items()}


if __name__ == "__main__":
    with ExitStack() as stack:
        for owner, name, answer in (
            (torch.cuda, "is_available", False),  # torch must not start it
            (torch.cuda.amp.common, "amp_definitely_not_available", False),
            (torch.cuda, "is_bf16_supported", True),
        ):
            stack.enter_context(mock.patch.object(owner, name, return_value=answer))
        print(json.dumps(cases()))
