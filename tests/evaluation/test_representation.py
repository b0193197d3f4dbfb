import pytest
import torch

from evaluation.representation import Covariances


def covariances(x: torch.Tensor, y: torch.Tensor, parts: int = 1) -> Covariances:
    found = Covariances()
    for rows in torch.arange(len(x)).chunk(parts):
        found.add(x[rows], y[rows])
    return found


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) + 3


def rotation() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]


def test_cka_does_not_see_rotation_scale_and_shift(data: torch.Tensor) -> None:
    assert covariances(data, data).cka() == pytest.approx(1, abs=1e-12)
    assert covariances(data, 5 * data @ rotation() - 7).cka() == pytest.approx(1, abs=1e-6)


def test_cka_is_that_of_the_centered_gram_matrices(data: torch.Tensor) -> None:
    """By the definition with HSIC, on unequal widths."""
    y = (data[:, :3] @ torch.tensor([[1.0, 2], [0, 1], [3, 0]])).tanh()
    center = torch.eye(200, dtype=torch.float64) - 1 / 200
    k, m = (center @ (v.double() @ v.double().T) @ center for v in (data, y))
    expected = (k * m).sum() / (k.norm() * m.norm())
    assert covariances(data, y).cka() == pytest.approx(expected.item(), rel=1e-9)
    assert 0.05 < expected < 0.95


def test_cka_of_independent_data_is_small_and_of_a_constant_zero(data: torch.Tensor) -> None:
    assert covariances(data, data[torch.randperm(200)]).cka() < 0.1
    assert covariances(data, torch.ones(200, 2)).cka() == 0


def test_parts_add_up(data: torch.Tensor) -> None:
    y = data @ rotation() + data**2
    whole = covariances(data, y)
    assert covariances(data, y, parts=7).cka() == pytest.approx(whole.cka(), rel=1e-12)
    halves = covariances(data[:50], y[:50]) + covariances(data[50:], y[50:])
    assert halves.cka() == pytest.approx(whole.cka(), rel=1e-12)


def test_a_linear_relation_is_recovered(data: torch.Tensor) -> None:
    y = data @ rotation()[:, :4] + torch.arange(4)
    recovered = covariances(data, y).linear_map()(data)
    assert (recovered - y).abs().max() < 0.02
    assert (recovered - y).norm() < 2e-3 * y.norm()


def test_fewer_items_than_dimensions_still_give_a_map() -> None:
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    assert covariances(x, x).linear_map()(x).isfinite().all()
