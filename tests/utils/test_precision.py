import re
from pathlib import Path

import pytest
import torch

from utils.precision import matmul_precision

ROOT = Path(__file__).parents[2]
PACKAGES = ("utils", "modeling", "data", "evaluation", "scripts")


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [True, False])
def test_it_holds_inside_and_the_former_setting_afterwards(tf32: bool) -> None:
    @matmul_precision(tf32)
    def fail() -> None:
        assert flags() == (tf32, tf32)
        raise KeyError

    before = flags()
    with matmul_precision(not tf32):
        with matmul_precision(tf32):
            assert flags() == (tf32, tf32)
        assert flags() == (not tf32, not tf32)
        with pytest.raises(KeyError):
            fail()
        assert flags() == (not tf32, not tf32)
    assert flags() == before


def test_nothing_else_sets_it() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    setting = [path.name for path in sources if re.search(r"allow_tf32|set_float32_matmul", path.read_text())]
    assert setting == ["precision.py"]
