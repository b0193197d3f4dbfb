"""The life of a run with a model of two lines."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.processes import run_ranks
from utils.config import load_config
from utils.run.gc_control import EVERY, gc_between_steps
from utils.run.training_run import TrainingRun


class Data:
    fingerprint = "data"

    def __len__(self) -> int:
        return 50


def begin(run: TrainingRun) -> nn.Linear:
    run.open_data(Data)
    model = nn.Linear(3, 2)
    run.begin({"model": model}, {"optimizer": (model, torch.optim.AdamW(model.parameters()))})
    return model


def save_twice(arguments: list[str]) -> None:
    with TrainingRun(load_config(arguments), "less") as run:
        model = begin(run)
        for _ in run.steps():
            run.count_step()
            run.save()
        run.finish()
        copies = list(run._saver._buffers._tensors.values())
        expected = sum(tensor.nbytes for tensor in model.state_dict().values()) if run.ctx.is_rank0 else 0
        assert sum(copy.nbytes for copy in copies) == expected


@pytest.mark.multiprocess
def test_only_rank_0_copies_the_state_to_host_memory(tiny_arguments: list[str], tmp_path: Path) -> None:
    arguments = [*tiny_arguments, f"experiment.output_dir={tmp_path}/run", "training.max_train_steps=2"]
    run_ranks(save_twice, arguments, processes=2)
    assert (tmp_path / "run/checkpoint-2/manifest.json").is_file()


def test_garbage_waits_for_its_step() -> None:
    class Node:
        def __init__(self) -> None:
            self.itself = self

    before = gc.isenabled(), gc.get_freeze_count()
    with gc_between_steps() as collect:
        garbage = weakref.ref(Node())
        assert not gc.isenabled()
        collect(EVERY - 1)
        assert garbage() is not None
        collect(EVERY)
        assert garbage() is None
    assert (gc.isenabled(), gc.get_freeze_count()) == before


def fail_in_a_step(arguments: list[str]) -> None:
    with TrainingRun(load_config(arguments), "less") as run:
        begin(run)
        for _ in run.steps():
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0
            raise ZeroDivisionError


def test_a_run_that_fails_in_a_step_leaves_garbage_collection_as_it_was(
    tiny_arguments: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        fail_in_a_step([*tiny_arguments, f"experiment.output_dir={tmp_path}/run"])
    assert caught.traceback  # keeps the loop over the steps alive
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
