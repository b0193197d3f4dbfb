"""The arithmetic of `benchmark.py predict`; tests/gpu/test_compiled.py tests what it counts."""

import pytest

from scripts.benchmarks.gpu_compiler import Launch
from scripts.benchmarks.predict import CARDS, COUNTED, Card, Steps, reduction_ms, totals

CARD = Card(flops=1e12, bytes=1e9, launch=1e-3)


def test_a_step_by_hand() -> None:
    """Two kernels of which one is limited by memory, the other by FLOPs; all but the launches grows with the batch."""
    copies, product = Launch("triton", "copy", 3e6, 0), Launch("library", "mm", 1e6, 4e9)
    small, large = (
        totals([(Launch(one.kind, one.name, one.bytes * n, one.flops * n), times) for one, times in launches])
        for n, launches in ((images / 64, [(copies, 2.0), (product, 1.0)]) for images in COUNTED)
    )
    for batch, scale in ((64, 1), (128, 2), (512, 8)):
        step = Steps(small, large).predict(batch, CARD)
        assert step.launches == 3
        assert step.gbytes == pytest.approx(scale * 7e-3)
        assert step.gflop == pytest.approx(scale * 4)
        assert step.ms == pytest.approx(3 + scale * (6 + 4))  # 2 * 3 MB at 1 GB/s, and 4 GFLOP at 1 TFLOP/s
        assert step.launch_share + step.memory_share + step.compute_share == pytest.approx(1)
        assert step.memory_share / step.compute_share == pytest.approx(6 / 4)


def test_all_reduce_by_hand() -> None:
    card = CARDS["h200"]
    assert reduction_ms(1e9, 1, card) == 0
    assert reduction_ms(1e9, 8, card) == pytest.approx(2 * 7 / 8 * 1e9 / 360e9 * 1e3)
    assert reduction_ms(1e9, 32, card) == pytest.approx(2 * 7 / 8 * 1e9 / 360e9 * 1e3 + 2 * 3 / 4 * 1e9 / 45e9 * 1e3)
