"""Divergences against the enumeration of all sequences: V = 4, N = 4, two classes."""

import itertools

import pytest
import torch
from torch import Tensor

from modeling import divergence
from modeling.divergence import conditional_entropy, conditional_kl, divergences, entropies, log_probabilities
from modeling.rear import ReAR
from utils.schema import GeneratorConfig, ModelConfig, VQModelConfig

SEQUENCES = torch.tensor([*itertools.product(range(4), repeat=4)])  # (256, 4)


def small_model(seed: int) -> ReAR:
    config = ModelConfig(
        vq_model=VQModelConfig(model_type="codes_only", codebook_size=4, token_size=4, num_latent_tokens=4),
        generator=GeneratorConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_seq_len=4,
            condition_num_classes=2,
            transition_alignment=False,
            z_dim=4,
        ),
    )
    torch.manual_seed(seed)
    model = ReAR(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def log_probability_of(model: ReAR, label: int) -> Tensor:
    """(256,) of each sequence, by the plain product of the probabilities of its codes."""
    logits = model(SEQUENCES, torch.full((256,), label)).logits.double()
    chosen = torch.log(torch.softmax(logits, dim=-1)).gather(2, SEQUENCES[..., None])
    return chosen[..., 0].sum(1)


@pytest.mark.parametrize("label", [0, 1])
@torch.no_grad()
def test_sums_over_contexts_are_the_divergences_of_whole_sequences(label: int) -> None:
    p, q = small_model(0), small_model(1)
    log_p, log_q = log_probability_of(p, label), log_probability_of(q, label)
    assert log_p.exp().sum().item() == pytest.approx(1)
    found = divergences(p, q, SEQUENCES, torch.full((256,), label))
    entropy = entropies(p, SEQUENCES, torch.full((256,), label))
    forward = (log_p.exp() * (log_p - log_q)).sum().item()
    reverse = (log_q.exp() * (log_q - log_p)).sum().item()
    assert (log_p.exp() @ found.p_to_q.sum(1)).item() == pytest.approx(forward, rel=1e-9)
    assert (log_q.exp() @ found.q_to_p.sum(1)).item() == pytest.approx(reverse, rel=1e-9)
    assert (log_p.exp() @ entropy.sum(1)).item() == pytest.approx(-(log_p.exp() @ log_p).item(), rel=1e-9)
    assert abs(forward - reverse) > 0.01


def test_batches_that_are_split_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = small_model(0), small_model(1), SEQUENCES, torch.arange(256) % 2
    whole = divergences(*arguments)
    monkeypatch.setattr(divergence, "LOGITS_AT_ONCE", 16 * 100)
    split = divergences(*arguments)
    for name in ("p_to_q", "q_to_p"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_a_model_does_not_diverge_from_itself() -> None:
    p = small_model(0)
    found = divergences(p, p, SEQUENCES, torch.zeros(256, dtype=torch.long))
    assert not found.p_to_q.any()
    assert not found.q_to_p.any()


def test_codes_without_probability_add_nothing() -> None:
    log_p = torch.tensor([[[0.5, 0.5, 0.0]]]).log()
    log_q = torch.tensor([[[0.25, 0.5, 0.25]]]).log()
    assert conditional_kl(log_p, log_q).item() == pytest.approx(0.5 * 0.6931472)
    assert conditional_entropy(log_p).item() == pytest.approx(0.6931472)


@torch.no_grad()
def test_log_probabilities_are_of_the_next_code() -> None:
    """The first row depends on the class only."""
    model = small_model(0)
    rows = log_probabilities(model, SEQUENCES, torch.zeros(256, dtype=torch.long))
    torch.testing.assert_close(rows[:1, 0].expand(256, -1), rows[:, 0])
    assert (rows[0, 1] - rows[-1, 1]).abs().max() > 1e-3
