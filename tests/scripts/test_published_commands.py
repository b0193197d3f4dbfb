"""The commands of the paper's README, as typed in its layout of files, with a tiny model and two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.processes import ROOT, free_port
from utils.files.weights import load_state_dict

SOURCES = ("scripts", "scripts_bash", "modeling", "data", "evaluation", "utils")


@pytest.fixture
def project(tiny_config_file: Path, tmp_path: Path) -> Path:
    """The sources, the data where the README puts them, and the shipped configs with tiny sizes in place of theirs."""
    for name in SOURCES:
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("configs", "ckpt", "dataset/pretokenized"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ckpt/maskgitvq.bin").symlink_to(tiny_config_file.parent / "tokenizer.safetensors")
    codes = (tiny_config_file.parent / "codes.jsonl").read_bytes()
    (tmp_path / "dataset/pretokenized/maskgitvq.jsonl").write_bytes(codes)
    tiny = yaml.safe_load(tiny_config_file.read_text())
    for name in ("rear_b", "rear_l"):
        shipped = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        shipped["model"], shipped["sampling"] = tiny["model"], tiny["sampling"]
        shipped["training"] = tiny["training"] | {"max_train_steps": 2, "per_gpu_batch_size": 4}
        shipped["dataset"] |= {"preprocessing": tiny["dataset"]["preprocessing"]}
        (tmp_path / f"configs/{name}.yaml").write_text(yaml.safe_dump(shipped))
    return tmp_path


def typed(command: str, project: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.multiprocess
def test_training_and_sampling_by_hand(project: Path) -> None:
    typed(
        "export PYTHONPATH=$(pwd); accelerate launch --num_machines=1 --num_processes=2 --machine_rank=0 "
        f"--main_process_ip=127.0.0.1 --main_process_port={free_port()} --same_network "
        'scripts/train_rear.py config="configs/rear_l.yaml" experiment.entity="your_wandb_entity" '
        'experiment.output_dir="temp/rear_l"',
        project,
    )
    assert json.loads((project / "temp/rear_l/status.json").read_text())["status"] == "completed"
    log = (project / "temp/rear_l/log.txt").read_text()
    assert "accelerate was asked for several processes and has started this one alone" in log
    sampled = typed(
        f"torchrun --nnodes=1 --nproc_per_node=2 --rdzv-endpoint=localhost:{free_port()} "
        'scripts/sample_imagenet_rear.py config="configs/training/generator/rear_l.yaml" '
        'experiment.output_dir="rear_l" experiment.generator_checkpoint="temp/rear_l"',
        project,
    )
    assert "configs/rear_l.yaml is used" in sampled.stderr
    assert np.load(project / "rear_l.npz")["arr_0"].shape == (37, 16, 16, 3)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_bash_scripts_train_sample_and_score(project: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (37, 16, 16, 3), np.uint8)
    np.savez(project / "VIRTUAL_imagenet256_labeled.npz", arr_0=images)
    typed("bash scripts_bash/rear_train.sh", project, NUM_GPUS="2")
    assert load_state_dict(project / "outputs/rear_b/model.safetensors")
    variables = {"REFERENCE": "VIRTUAL_imagenet256_labeled.npz", "BACKEND": "efficientnet_lite0", "NUM_GPUS": "2"}
    scored = typed("bash scripts_bash/rear_test.sh sampling.seed=3", project, **variables)
    report = json.loads((project / "outputs/rear_b_samples.efficientnet_lite0.json").read_text())
    assert f"Frechet distance (EfficientNet-Lite0): {report['metrics']['frechet_distance']}" in scored.stdout
