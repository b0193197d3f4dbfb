import pytest

from utils.schedules import learning_rate_at


def test_learning_rate_of_the_published_recipe() -> None:
    rate = lambda step: learning_rate_at(step, 4e-4, 62_500, 250_000, 1e-5)  # noqa: E731
    assert rate(0) == 0
    assert rate(31_250) == pytest.approx(2e-4)
    assert rate(62_500) == pytest.approx(4e-4)
    assert rate(156_250) == pytest.approx((4e-4 + 1e-5) / 2)
    assert rate(250_000) == pytest.approx(1e-5)
    assert rate(300_000) == pytest.approx(1e-5)
    assert learning_rate_at(0, 1e-3, 0, 10, 0) == 1e-3
