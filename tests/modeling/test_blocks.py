import pytest
import torch
import torch.nn.functional as F

from modeling import blocks
from modeling.blocks import Attention


@pytest.mark.parametrize("scores_at_once", [1, 2 * 4 * 18**2, 2**20])
def test_attention_with_dropout_equals_torchs(scores_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, dropout masks, gradients and the state of the random numbers included."""
    monkeypatch.setattr(blocks, "SCORES_AT_ONCE", scores_at_once)
    attention = Attention(hidden_size=32, num_heads=4, dropout=0.0, attn_drop=0.3).train()
    x, upstream = torch.randn(2, 5, 18, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for attend in (attention.causal, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.3, True)):
        torch.manual_seed(1)
        inputs = [one.detach().requires_grad_() for one in attention.split_heads(x)]
        attended = attend(*inputs)
        attended.backward(upstream.unflatten(2, (4, 8)).transpose(1, 2))
        results.append([attended, *(one.grad for one in inputs), torch.rand(3)])
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)
    assert not torch.equal(results[0][0], attention.eval().causal(*inputs))
