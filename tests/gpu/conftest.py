import pytest
import torch

from modeling.rear import ReAR
from modeling.tokenizers.registry import build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from tests.gpu.fake_gpu import FakeGpu, attention
from utils.schema import Config, GeneratorConfig, ModelConfig, VQModelConfig


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


@pytest.fixture
def config() -> Config:
    """N = 64 codes per image of 32 pixels, 2 blocks; sampling with every option."""
    config = Config()
    config.training.mixed_precision = "bf16"
    config.model = ModelConfig(
        VQModelConfig(
            codebook_size=24, token_size=8, resolution=32, hidden_channels=8, channel_mult=[1, 1, 2], num_res_blocks=1
        ),
        GeneratorConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_seq_len=64,
            condition_num_classes=5,
            decode_align_layer_idx=1,
            projection_dim=16,
            z_dim=8,
            top_k=9,
            top_p=0.9,
        ),
    )
    return config


@pytest.fixture
def model(gpu: FakeGpu, config: Config) -> ReAR:
    return gpu.put(ReAR(config.model))


@pytest.fixture
def tokenizer(gpu: FakeGpu, config: Config) -> Tokenizer:
    return gpu.put(build_tokenizer(config.model.vq_model).eval().requires_grad_(False))
