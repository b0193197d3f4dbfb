"""Checkpoints of a module of two lines: what comes back, what is kept, and what is written in the background."""

import logging
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.processes import run_ranks
from utils.distributed import init_distributed
from utils.errors import InputError
from utils.run import checkpoint as checkpoint_module
from utils.run.checkpoint import (
    CheckpointSaver,
    Resumable,
    Snapshot,
    list_checkpoints,
    load_modules,
    load_optimizers,
    prune_checkpoints,
    take_snapshot,
    write_checkpoint,
)
from utils.run.manifest import Provenance, TrainingState, read_manifest
from utils.run.resume import find_start
from utils.run.sharding import SHARDS_ON_CPU, parallelize
from utils.schema import ExperimentConfig, TrainingConfig


def trained(steps: int) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def resumable(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> Resumable:
    return Resumable({"model": model} | ({"ema": ema} if ema else {}), {"optimizer": (model, optimizer)})


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> None:
    snapshot = take_snapshot(resumable(model, optimizer, ema))
    write_checkpoint(folder, TrainingState(step, 16, 16 * step), Provenance(), snapshot)


def test_model_optimizer_ema_and_state_come_back(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    ema = nn.Linear(3, 2)
    save(tmp_path, 3, model, optimizer, ema)
    other_model, other_optimizer = trained(0)
    other_ema = nn.Linear(3, 2)
    assert load_modules(tmp_path / "checkpoint-3", resumable(other_model, other_optimizer, other_ema)) == []
    load_optimizers(tmp_path / "checkpoint-3", resumable(other_model, other_optimizer, other_ema))
    assert read_manifest(tmp_path / "checkpoint-3").state == TrainingState(3, 16, 48)
    assert torch.equal(model.weight, other_model.weight)
    assert torch.equal(ema.weight, other_ema.weight)
    moments = [o.state[o.param_groups[0]["params"][0]]["exp_avg_sq"] for o in (optimizer, other_optimizer)]
    assert torch.equal(*moments)
    assert (tmp_path / "checkpoint-3/model.safetensors").stat().st_mode & 0o044  # readable by others, as umask says


def test_only_complete_checkpoints_count_and_the_newest_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for step in (5, 10, 100):
        save(tmp_path, step, model, optimizer, None)
        prune_checkpoints(tmp_path, keep_last=2, keep_every=0)
    (tmp_path / "checkpoint-200.tmp").mkdir()
    (tmp_path / "checkpoint-300").mkdir()  # cut off before its last file
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-12.bak").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    start = find_start(tmp_path, "auto")
    assert start.checkpoint == str(tmp_path / "checkpoint-100")
    assert start.back_up == (tmp_path / "checkpoint-300",)
    assert find_start(tmp_path / "empty", "auto").checkpoint is None


def test_an_error_while_saving_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(1)

    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="disk full"):
        save(tmp_path, 1, model, optimizer, None)
    assert list_checkpoints(tmp_path) == []


def test_a_checkpoint_of_another_model_names_the_difference(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer, None)
    with pytest.raises(InputError, match=r"weight \(2, 3\) instead of \(4, 3\)"):
        load_modules(tmp_path / "checkpoint-1", Resumable({"model": nn.Linear(3, 4)}))


def test_an_ema_that_a_checkpoint_lacks_starts_from_the_model(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    save(tmp_path, 2, model, optimizer, None)
    ema = nn.Linear(3, 2)
    notices = load_modules(tmp_path / "checkpoint-2", resumable(nn.Linear(3, 2), optimizer, ema))
    assert notices == ["checkpoint-2 has no EMA: it starts from the weights of this step"]
    assert torch.equal(ema.weight, model.weight)


def test_the_optimizer_keeps_the_settings_of_the_config(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    save(tmp_path, 2, model, optimizer, None)
    other = torch.optim.AdamW(model.parameters(), lr=0.3, betas=(0.5, 0.6), weight_decay=0.7)
    load_optimizers(tmp_path / "checkpoint-2", resumable(model, other, None))
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.5, 0.6), 0.7)
    assert other.state[model.weight]["step"] == 2


def test_before_the_first_update_there_is_no_optimizer_state(tmp_path: Path) -> None:
    """torch's `get_optimizer_state_dict` would make a step; the first update after a resume would then differ."""
    model, optimizer = trained(0)
    save(tmp_path, 0, model, optimizer, None)
    assert torch.load(tmp_path / "checkpoint-0/optimizer.bin", weights_only=True)["state"] == {}
    load_optimizers(tmp_path / "checkpoint-0", resumable(model, optimizer, None))
    assert not optimizer.state


def test_two_optimizers_share_a_module(tmp_path: Path) -> None:
    """Like Muon for matrices and AdamW for other parameters; each has its file, also an optimizer without state."""

    def made(learning_rate: float) -> tuple[nn.Linear, Resumable]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        matrices = torch.optim.SGD([model.weight], lr=learning_rate, momentum=0.9)
        others = torch.optim.AdamW([model.bias], lr=learning_rate)
        return model, Resumable({"model": model}, {"matrices": (model, matrices), "others": (model, others)})

    model, both = made(0.1)
    model(torch.ones(1, 3)).sum().backward()
    for _, optimizer in both.optimizers.values():
        optimizer.step()
    write_checkpoint(tmp_path, TrainingState(1, 16, 16), Provenance(), take_snapshot(both))
    other, loaded = made(0.3)
    load_modules(tmp_path / "checkpoint-1", loaded)
    load_optimizers(tmp_path / "checkpoint-1", loaded)
    matrices, others = (optimizer for _, optimizer in loaded.optimizers.values())
    assert torch.equal(matrices.state[other.weight]["momentum_buffer"], torch.ones(2, 3))
    assert others.state[other.bias]["step"] == 1
    assert matrices.param_groups[0]["lr"] == 0.3
    swapped = Resumable(loaded.modules, {"matrices": (other, others)})
    with pytest.raises(InputError, match=r"matrices\.bin: found other parameters than expected; 2 differ \(bias\)"):
        load_optimizers(tmp_path / "checkpoint-1", swapped)


def test_an_optimizer_without_a_state(tmp_path: Path) -> None:
    model, _ = trained(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save(tmp_path, 1, model, optimizer, None)
    load_optimizers(tmp_path / "checkpoint-1", resumable(model, optimizer, None))


def test_a_save_holds_the_state_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training changes the weights, and a second save starts, while the first is still being written."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    may_write, write = threading.Event(), checkpoint_module.write_checkpoint

    def held_write(folder: Path, state: TrainingState, provenance: Provenance, snapshot: Snapshot) -> Path:
        may_write.wait()
        return write(folder, state, provenance, snapshot)

    monkeypatch.setattr(checkpoint_module, "write_checkpoint", held_write)
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
    optimizer.state[model.weight]["step"].zero_()
    saver.wait()
    for step in (1, 2):
        assert torch.equal(load_file(tmp_path / f"checkpoint-{step}/model.safetensors")["weight"], weights[step])
        adam = torch.load(tmp_path / f"checkpoint-{step}/adam.bin", weights_only=True)
        assert adam["state"]["weight"]["step"] == step


def snapshot_of_a_sharded_module() -> None:
    with init_distributed(30, 30) as ctx:
        model, optimizer = trained(0)
        model.register_buffer("count", torch.zeros(3))
        parallelize(model, [], ctx, TrainingConfig(fsdp=True))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            if optimizer.state[model.weight]["step"] == 1:
                snapshot = take_snapshot(Resumable({"model": model}, {"optimizer": (model, optimizer)}))
                weight = model.weight.full_tensor().clone()
                model.count += 1
        if ctx.is_rank0:
            assert snapshot["optimizer.bin"]["state"]["weight"]["step"] == 1
            assert torch.equal(snapshot["model.safetensors"]["weight"], weight)
            assert torch.equal(snapshot["model.safetensors"]["count"], torch.zeros(3))
        else:
            assert snapshot["model.safetensors"] == {}


@pytest.mark.multiprocess
@pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on GPUs only")
def test_training_does_not_change_the_snapshot_of_a_sharded_module() -> None:
    run_ranks(snapshot_of_a_sharded_module, processes=2)
