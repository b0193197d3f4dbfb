from functools import partial
from typing import get_args

import pytest

from utils.schedules import SCHEDULES, cosine, ema_decay, ema_warm_up
from utils.schema import LRSchedulerConfig


def test_learning_rate_of_the_published_recipe() -> None:
    rate = partial(cosine, peak=4e-4, warmup_steps=62_500, max_steps=250_000, end_lr=1e-5)
    assert rate(0) == 0
    assert rate(31_250) == pytest.approx(2e-4)
    assert rate(62_500) == pytest.approx(4e-4)
    assert rate(156_250) == pytest.approx((4e-4 + 1e-5) / 2)
    assert rate(250_000) == pytest.approx(1e-5)
    assert rate(300_000) == pytest.approx(1e-5)
    assert cosine(0, peak=1e-3, warmup_steps=0, max_steps=10, end_lr=0) == 1e-3


def test_the_config_names_the_schedules_of_the_table() -> None:
    assert set(get_args(LRSchedulerConfig.__annotations__["scheduler"])) == set(SCHEDULES)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.5, 0.999, 0.9999])
def test_the_decay_of_an_ema_rises_to_that_of_the_config(decay: float) -> None:
    warm = ema_warm_up(decay)
    assert ema_decay(warm + 1, decay) == decay
    assert warm == 0 or ema_decay(warm - 2, decay) < decay
    assert ema_decay(0, decay) == min(decay, 0.1)
    assert ema_decay(90, decay) == min(decay, 0.91)
