from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from modeling import analysis
from modeling.analysis import POSITIONS, by_position, hidden_states, nearest_codes, predictions
from modeling.rear import ReAR


class Oracle(nn.Module):
    """Knows that each code is the one before plus 1, and the first one the class label."""

    def forward(self, context: Tensor, class_labels: Tensor) -> SimpleNamespace:
        before = torch.cat([class_labels[:, None] - 1, context[:, :-1]], dim=1)
        return SimpleNamespace(logits=50.0 * nn.functional.one_hot((before + 1) % 24, 24))


LABELS = torch.tensor([0, 3, 4])
CODES = (LABELS[:, None] + torch.arange(16)) % 24  # (3, 16)


def test_an_oracle_is_always_right() -> None:
    found = predictions(Oracle(), CODES, CODES, LABELS)
    assert found.correct.shape == (3, 16)
    assert found.correct.all()
    assert found.loss.max() < 1e-9
    assert found.entropy.max() < 1e-9


def test_an_oracle_fails_right_after_a_wrong_code() -> None:
    context = CODES.clone()
    context[1, 5] = (context[1, 5] + 7) % 24
    found = predictions(Oracle(), context, CODES, LABELS)
    assert (~found.correct.bool()).nonzero().tolist() == [[1, 6]]
    assert found.loss[1, 6] == pytest.approx(50)
    assert by_position([found, found], lambda one: one.correct) == [1.0] * 6 + [pytest.approx(2 / 3)] + [1.0] * 9


@torch.no_grad()
def test_hidden_states_are_the_outputs_of_the_blocks(tiny_model: ReAR) -> None:
    states = hidden_states(tiny_model, CODES, LABELS)
    assert [state.shape for state in states] == [(3, 18, 32)] * 2
    condition = tiny_model.condition(LABELS)[:, 1:-1]
    logits = tiny_model.lm_head(tiny_model.adaln_before_head(states[-1][:, POSITIONS["next"]], condition, None))
    output = tiny_model(CODES, LABELS)
    torch.testing.assert_close(logits, output.logits)
    torch.testing.assert_close(
        tiny_model.encode_align_mlp(states[0][:, POSITIONS["own"]]), output.projections["encode"]
    )
    assert not tiny_model.blocks[0]._forward_hooks


def test_the_nearest_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "CODES_AT_ONCE", 2)
    codebook = torch.tensor([[0.0], [1.0], [1.5], [4.0], [3.0]])
    assert nearest_codes(codebook).tolist() == [1, 2, 1, 4, 3]
