"""torch is asked on a machine without a GPU which kernel it would choose for the attention of each model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.test_compiled import PAGE, RELEASE
from utils.config import ROOT

HEADER = "| attention | A100 | H100, H200 |"

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs torch's CUDA build"),
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("gcc") is None, reason="needs gcc on Linux"),
]


def chosen_kernels(major: int, folder: Path) -> dict[str, str]:
    """On a GPU of compute capability `major`.0."""
    library = folder / "libcuda.so.1"
    source = ROOT / "tests/gpu/driver.c"
    subprocess.run(["gcc", f"-DMAJOR={major}", "-shared", "-fPIC", "-o", library, source], check=True)
    result = subprocess.run(
        [sys.executable, "-m", "tests.gpu.attention_kernels"],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder), "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def kept_table(column: int) -> dict[str, str]:
    lines = PAGE[PAGE.index(HEADER) :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[column] for row in rows}


@pytest.mark.parametrize(
    ("major", "column"), [pytest.param(8, 1, marks=pytest.mark.slow, id="A100"), pytest.param(9, 2, id="Hopper")]
)
def test_a_fused_kernel_serves_each_attention(major: int, column: int, tmp_path: Path) -> None:
    chosen = chosen_kernels(major, tmp_path)
    assert all("math" not in kernels.split() for kernels in chosen.values()), chosen
    assert chosen["training, bf16"] == "flash"
    if f"torch {RELEASE}" in PAGE:
        assert chosen == kept_table(column)
