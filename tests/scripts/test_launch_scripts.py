"""The commands that a user types: launch scripts on CPU with two processes, and what the README says."""

import json
import os
import re
import shlex
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
README = (ROOT / "README.md").read_text()
CODE_BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split(" # ")[0].strip()
    for block in CODE_BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
WRITTEN_BY_OTHERS = re.compile(r"outputs/\w+/(rear|tokenizer)\.yaml")  # of the commands, by make_config.py
BROUGHT = {"LOC_synset_mapping.txt"}


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


def test_the_readme_has_commands() -> None:
    assert "bash scripts_bash/quickstart.sh" in COMMANDS
    assert "bash scripts_bash/test.sh" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_name_files_and_keys_that_exist(command: str) -> None:
    words = [WRITTEN_BY_OTHERS.sub("configs/rear_blue_marble.yaml", word) for word in shlex.split(command)]
    files = [word.removeprefix("config=") for word in words]
    for file in (file for file in files if re.fullmatch(r"[\w/]+\.(py|sh|yaml|sbatch|txt)", file)):
        assert file in BROUGHT or (ROOT / file).is_file(), file
    overrides = [word for word in words if re.fullmatch(r"(config|[a-z_]+(\.[a-z_]+)+)=.*", word)]
    if overrides:
        load_config(
            ["experiment.output_dir=unused", *(word.replace("config=", f"config={ROOT}/") for word in overrides)]
        )


@pytest.mark.parametrize("path", re.findall(r"`((?:\w+/)+\w+\.\w+)`|\]\(((?:\w+/)+\w+\.\w+)\)", README))
def test_readme_names_files_that_exist(path: tuple[str, str]) -> None:
    name = path[0] or path[1]
    assert name.startswith("outputs/") or (ROOT / name).is_file(), name
