"""The launch scripts on a CPU with two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling.rear import ReAR
from utils.config import load_config
from utils.files.weights import save_weights

ROOT = Path(__file__).parents[2]


@pytest.mark.multiprocess
def test_rear_test_samples_and_scores(tiny_config_file: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(0)
    save_weights(ReAR(load_config([f"config={tiny_config_file}"]).model).state_dict(), weights)
    np.savez(tmp_path / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 256, (37, 16, 16, 3), np.uint8))
    variables = {
        "CONFIG": tiny_config_file,
        "NUM_GPUS": 2,
        "CHECKPOINT": weights,
        "OUTPUT_DIR": tmp_path / "samples",
        "REFERENCE": tmp_path / "reference.npz",
        "BACKEND": "efficientnet_lite0",
        "OMP_NUM_THREADS": 1,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # the environment's torchrun
    }
    result = subprocess.run(
        ["bash", str(ROOT / "scripts_bash/rear_test.sh"), "sampling.seed=3"],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(np.load(tmp_path / "samples.npz")["arr_0"]) == 37
    report = json.loads((tmp_path / "samples.efficientnet_lite0.json").read_text())
    assert f"Frechet distance (EfficientNet-Lite0): {report['metrics']['frechet_distance']}" in result.stdout
