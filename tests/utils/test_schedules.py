from functools import partial
from typing import get_args

import pytest

from utils.config import load_config
from utils.schedules import SCHEDULES, cosine, ema_decay, ema_warm_up, schedule_warnings
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


def test_a_schedule_that_ends_with_the_run_is_no_warning() -> None:
    names = ["lr_scheduler.params.warmup_steps", *(f"model.generator.{x}_anneal_end" for x in ("randomness", "order"))]
    starts = ["model.generator.order_anneal_start=0", "model.generator.order=annealed", "experiment.output_dir=x"]

    def warnings_of(end: int) -> list[str]:
        return schedule_warnings(load_config([*starts, "training.max_train_steps=10", *(f"{x}={end}" for x in names)]))

    assert warnings_of(10) == []
    assert [warning.partition("=")[0] for warning in warnings_of(11)] == names
