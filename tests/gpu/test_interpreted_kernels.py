"""The kernels that Inductor generates for a GPU compute what they were generated from, in Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.gpu.test_compiled import PAGE, RELEASE
from utils.config import ROOT

FUNCTIONS = 9  # five of the decode step, forward and backward pass of the loss and of a block
LARGEST = {"torch.float32": 1e-5, "torch.bfloat16": 0.05}  # relative to the largest value of a result


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(f"torch {RELEASE}" not in PAGE, reason="interpreters of other releases fail in loops")
@pytest.mark.skipif(
    not torch.backends.cuda.is_built() or importlib.util.find_spec("triton") is None,
    reason="needs torch's CUDA build and Triton",
)
def test_kernels_compute_their_graphs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.gpu.interpreted_kernels"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    differences = json.loads(result.stdout.splitlines()[-1])
    assert len(differences) == FUNCTIONS * len(LARGEST)
    for dtype, largest in LARGEST.items():
        assert all(found <= largest for name, found in differences.items() if name.endswith(dtype)), differences
