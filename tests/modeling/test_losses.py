from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from modeling import losses
from modeling.losses import head_scores, next_token_loss, rear_loss, token_losses, token_scores
from modeling.robust_embedding import Tap, alignment_loss, cosine_to_targets
from utils.schema import GeneratorConfig


def test_next_token_loss_of_known_logits() -> None:
    logits = torch.zeros(2, 3, 8)
    targets = torch.randint(0, 8, (2, 3))
    torch.testing.assert_close(next_token_loss(logits, targets), torch.log(torch.tensor(8.0)))
    confident = torch.nn.functional.one_hot(targets, 8) * 100.0
    assert next_token_loss(confident, targets) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_are_torchs_cross_entropy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 32)
    logits = (5 * torch.randn(3, 5, 8)).to(dtype).requires_grad_()
    targets, weights = torch.randint(0, 8, (3, 5)), torch.randn(3, 5)
    wanted = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    found = token_losses(logits, targets)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((values * weights).sum(), logits)[0] for values in (found, wanted)]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients)


def test_the_loss_keeps_no_copy_of_the_logits() -> None:
    logits, kept = torch.randn(2, 64, 512, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        next_token_loss(logits, torch.zeros(2, 64, dtype=torch.int64))
    others = [tensor for tensor in kept if tensor.data_ptr() != logits.data_ptr()]
    assert sum(tensor.nbytes for tensor in others) < logits.nbytes / 20


@pytest.mark.parametrize("bf16", [False, True])
def test_scores_in_slices_are_those_of_all_logits(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_IN_SLICE", 4 * 1000)  # 15 positions: 4, 4, 4 and 3
    head, kept = torch.nn.Linear(16, 1000), []
    hidden, codes = torch.randn(3, 5, 16, requires_grad=True), torch.randint(0, 1000, (3, 5))
    codes[1, 2] = head(hidden)[1, 2].argmax()
    weights, inputs = torch.randn(3, 5), [hidden, head.weight, head.bias]
    with torch.autocast("cpu", enabled=bf16):
        wanted = token_scores(head(hidden), codes)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            found = head_scores(head, hidden, codes)
    torch.testing.assert_close(found.losses, wanted.losses)
    assert torch.equal(found.correct, wanted.correct)
    assert found.correct[1, 2]
    assert not any(1000 in tensor.shape[1:] for tensor in kept)  # no logits
    gradients = [torch.autograd.grad((scores.losses * weights).sum(), inputs) for scores in (found, wanted)]
    tolerance = {"atol": 0.05, "rtol": 0.05} if bf16 else {}  # the sum over slices is more exact than bf16
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_alignment_loss_bounds_and_divisor() -> None:
    vectors = torch.randn(2, 4, 8)
    cosine = cosine_to_targets(3 * vectors, vectors)
    torch.testing.assert_close(alignment_loss(cosine), torch.tensor(-1.0))
    torch.testing.assert_close(alignment_loss(cosine_to_targets(-vectors, vectors)), torch.tensor(1.0))
    excluded = torch.zeros(2, 4, dtype=torch.bool)
    excluded[0] = True
    torch.testing.assert_close(alignment_loss(cosine, excluded), torch.tensor(-0.5))


def test_rear_loss_puts_the_terms_together() -> None:
    codes = torch.randint(0, 8, (2, 4))
    vectors, logits = torch.randn(2, 4, 6), torch.randn(2, 4, 8)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[:, :2] = True
    config = GeneratorConfig(transition_alignment_weight=0.5)
    encode = Tap("encode", 0, "own", z_dim=6, exclude_perturbed=True)
    decode = Tap("decode", 1, "next", z_dim=6)
    projections, targets = {"encode": vectors, "decode": -vectors}, {"encode": vectors, "decode": vectors}
    terms = rear_loss(logits, projections, codes, targets, mask, [encode, decode], config)
    torch.testing.assert_close(
        terms.metrics["train/proj_loss"], torch.tensor(-0.5 + 1.0)
    )  # encode at clean positions only
    torch.testing.assert_close(terms.loss, next_token_loss(logits, codes) + 0.25)
    total, count = terms.metrics["train/encode_cos"]
    torch.testing.assert_close(total / count, torch.tensor(1.0))  # of clean positions alone
    torch.testing.assert_close(terms.metrics["train/decode_cos"], torch.tensor(-1.0))
    everywhere, weighted = replace(encode, exclude_perturbed=False), replace(decode, weight=0.25)
    terms = rear_loss(logits, projections, codes, targets, mask, [everywhere, weighted], config)
    torch.testing.assert_close(terms.metrics["train/proj_loss"], torch.tensor(-1.0 + 0.25))
    plain = rear_loss(logits, {}, codes, {}, mask, [], config)
    assert torch.equal(plain.loss, next_token_loss(logits, codes))
    assert not any(getattr(value, "requires_grad", False) for value in terms.metrics.values())
    assert torch.equal(terms.metrics["train/loss"], terms.loss)


def test_a_term_that_has_ended_is_0_and_has_no_cosine() -> None:
    """Its projector keeps a gradient, of 0, without which DDP would wait for it."""
    codes, vectors, mask = torch.randint(0, 8, (2, 4)), torch.randn(2, 4, 6), torch.zeros(2, 4, dtype=torch.bool)
    logits, projection = torch.randn(2, 4, 8), torch.randn(2, 4, 6, requires_grad=True)
    taps = [Tap("a", 0, "own", z_dim=6), Tap("b", 0, "next", z_dim=6)]
    config = GeneratorConfig()
    both = rear_loss(logits, {"a": vectors, "b": projection}, codes, {"a": -vectors}, mask, taps, config)
    one = rear_loss(logits, {"a": vectors}, codes, {"a": -vectors}, mask, taps[:1], config)
    assert torch.equal(both.loss, one.loss)
    assert [value.item() for value in both.metrics["train/b_cos"]] == [0.0, 0.0]
    both.loss.backward()
    assert torch.equal(projection.grad, torch.zeros_like(projection))
