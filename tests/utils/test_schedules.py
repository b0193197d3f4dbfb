import pytest

from utils.schedules import learning_rate_at, perturbation_ratio_at


def test_learning_rate_of_the_published_recipe() -> None:
    rate = lambda step: learning_rate_at(step, 4e-4, 62_500, 250_000, 1e-5)  # noqa: E731
    assert rate(0) == 0
    assert rate(31_250) == pytest.approx(2e-4)
    assert rate(62_500) == pytest.approx(4e-4)
    assert rate(156_250) == pytest.approx((4e-4 + 1e-5) / 2)
    assert rate(250_000) == pytest.approx(1e-5)
    assert rate(300_000) == pytest.approx(1e-5)
    assert learning_rate_at(0, 1e-3, 0, 10, 0) == 1e-3


def test_perturbation_ratio_of_the_paper() -> None:
    for step in (0, 1_000, 62_500, 187_500, 250_000):
        assert perturbation_ratio_at(step, 0, 187_500) == pytest.approx(max(0, 1 - 4 / 3 * step / 250_000))
    assert perturbation_ratio_at(5, 10, 20) == 1
    assert perturbation_ratio_at(15, 10, 20) == 0.5
    assert perturbation_ratio_at(0, -1, -1) == 0  # the family's way to switch it off
