"""The uninterrupted runs that all others must equal, each made once."""

from pathlib import Path

import pytest

from tests.faults.runs import NO_DROPOUT, Run

STEPS = ["training.max_train_steps=12", "experiment.save_every=4"]


@pytest.fixture(scope="session")
def fault_arguments(tiny_arguments: list[str]) -> list[str]:
    """Twelve steps of 8 images, two passes over the data, with a checkpoint at 4, 8 and 12; dropout on."""
    return [*tiny_arguments, *STEPS]


@pytest.fixture(scope="session")
def oracle(fault_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process."""
    return Run(fault_arguments, tmp_path_factory.mktemp("oracle") / "run").completed()


@pytest.fixture(scope="session")
def pair_arguments(fault_arguments: list[str]) -> list[str]:
    """For two processes: half the images each; a rank that is gone is noticed in seconds."""
    return [
        *fault_arguments,
        "training.per_gpu_batch_size=4",
        "training.process_group_timeout=20",
        "training.launch_timeout=20",
    ]


@pytest.fixture(scope="session")
def pair_oracle(pair_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two processes."""
    return Run(pair_arguments, tmp_path_factory.mktemp("pair_oracle") / "run").completed(processes=2)


@pytest.fixture(scope="session")
def plain_oracle(fault_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, no dropout: its masks are the only thing that depends on how a batch is cut."""
    return Run([*fault_arguments, *NO_DROPOUT], tmp_path_factory.mktemp("plain_oracle") / "run").completed()


@pytest.fixture
def run(fault_arguments: list[str], tmp_path: Path) -> Run:
    return Run(fault_arguments, tmp_path / "run")


@pytest.fixture
def pair(pair_arguments: list[str], tmp_path: Path) -> Run:
    return Run(pair_arguments, tmp_path / "run")
