import pytest
import torch

from tests.gpu.fake_gpu import FakeGpu, attention


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch is built without CUDA, so nothing can pretend to be on a GPU")
    # Without a GPU autocast would switch itself off.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    gpu = FakeGpu()
    try:
        gpu.like(torch.zeros(2))[:1]
    except RuntimeError:
        pytest.skip(f"torch {torch.__version__} calls the driver to index a tensor that pretends to be on a GPU")
    return gpu
