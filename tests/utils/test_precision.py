import os
import re
from pathlib import Path

import pytest
import torch

from utils.precision import deterministic, exact_attention_dropout, in_bf16, matmul_precision
from utils.schema import TrainingConfig

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


def test_cudnn_does_not_serve_attention_inside() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    with exact_attention_dropout():
        assert not enabled()
    assert enabled() == before


def state() -> tuple:
    cudnn = torch.backends.cudnn
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, workspace


def put() -> None:
    torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # has no deterministic algorithm


def test_determinism_holds_inside_and_can_be_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert state() == (False, False, True, None)
    with deterministic(True):
        assert state() == (True, True, False, ":4096:8")
        with deterministic(False):
            assert state() == (False, False, False, ":4096:8")
            put()
        assert state() == (True, True, False, ":4096:8")
        with pytest.raises(RuntimeError, match="deterministic"):
            put()
    assert state() == (False, False, True, None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert state()[-1] == ":16:8"
    assert state()[-1] == ":16:8"


def test_nothing_else_sets_it() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    setting = [path.name for path in sources if re.search(r"allow_tf32|set_float32_matmul", path.read_text())]
    assert setting == ["precision.py"]


def test_auto_is_bf16_on_cuda_only() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [in_bf16(TrainingConfig(mixed_precision=p), d) for p in ("auto", "bf16", "no") for d in (cpu, cuda)] == [
        *(False, True),
        *(True, True),
        *(False, False),
    ]
