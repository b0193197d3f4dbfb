"""Saving while training goes on: one copy of the state in host memory, on rank 0 alone, used again by every save."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from utils.run import saver as saver_module
from utils.run.manifest import Provenance, TrainingState
from utils.run.saver import CheckpointSaver
from utils.run.snapshot import Resumable, Snapshot
from utils.schema import ExperimentConfig


def test_saves_share_their_memory_and_hold_the_state_of_their_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save begins, and training changes the weights, while the first is still being written."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    may_write, addresses, write = threading.Event(), [], saver_module.write_checkpoint

    def held_write(folder: Path, state: TrainingState, provenance: Provenance, snapshot: Snapshot) -> Path:
        may_write.wait()
        addresses.append({name: tensor.data_ptr() for name, tensor in snapshot.tensors().items()})
        return write(folder, state, provenance, snapshot)

    monkeypatch.setattr(saver_module, "write_checkpoint", held_write)
    saver = CheckpointSaver(ExperimentConfig(output_dir=str(tmp_path)), Provenance(), None, logging.getLogger("test"))
    weights = {}
    for step in (1, 2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        weights[step] = model.weight.detach().clone()
        saver.start(
            TrainingState(step, 8, 8 * step), Resumable({"model": model}, {"adam": (model, optimizer)}), is_rank0=True
        )
        threading.Timer(0.2, may_write.set).start()
    model.weight.data.zero_()
    saver.wait()
    for step in (1, 2):
        assert torch.equal(load_file(tmp_path / f"checkpoint-{step}/model.safetensors")["weight"], weights[step])
        adam = torch.load(tmp_path / f"checkpoint-{step}/adam.bin", weights_only=True)
        assert adam["state"]["weight"]["step"] == step
    assert addresses[0] == addresses[1]
    own = {tensor.data_ptr() for tensor in [*model.state_dict().values(), *optimizer.state[model.weight].values()]}
    assert not own & set(addresses[0].values())
