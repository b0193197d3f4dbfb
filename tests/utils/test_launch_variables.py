"""Environment variables of a launch."""

import os

import pytest

from utils.config import load_config
from utils.config_checks import check_training
from utils.errors import InputError
from utils.launch_variables import LAUNCH_VARIABLES, PORTS, TASK_COUNTS, int_variable, launch_environment

PAIR = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCH_VARIABLES, *TASK_COUNTS, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "\u00b2"}, "WORLD_SIZE="),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"WORLD_SIZE": "2"}, "no RANK"),
        (PAIR | {"RANK": ""}, "no RANK"),
        (PAIR | {"RANK": "x"}, "RANK='x'"),
        (PAIR | {"RANK": "-1"}, "RANK='-1'"),
        (PAIR | {"RANK": "2"}, "RANK='2' in the environment: expected 0 to 1"),
        (PAIR | {"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2 .* torchrun or accelerate"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 .* torchrun or accelerate"),
    ],
)
def test_a_launch_that_cannot_be_meant_is_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ | variables)
    with pytest.raises(InputError, match=message) as error:
        launch_environment()
    with pytest.raises(InputError) as of_config:  # before torch is imported
        check_training(load_config(["experiment.output_dir=x"]))
    assert str(of_config.value) == str(error.value)


@pytest.mark.parametrize("port", ["", "x", "65536"])
def test_a_port_is_a_number_below_65536(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(InputError, match="MASTER_PORT="):
        int_variable("MASTER_PORT", default=0, allowed=PORTS)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        (PAIR, (1, 2, 1)),
        ({"SLURM_NTASKS": "2"}, (0, 1, 0)),  # in the batch shell: that of the job, not of a step
        ({"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),
        (PAIR | {"SLURM_STEP_NUM_TASKS": "2"}, (1, 2, 1)),  # torchrun in each task
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, (0, 1, 0)),  # separate runs
    ],
)
def test_rank_size_and_local_rank(
    variables: dict[str, str], expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ | variables)
    assert launch_environment() == expected
