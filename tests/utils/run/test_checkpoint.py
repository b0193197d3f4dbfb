from pathlib import Path

import pytest
import torch
from torch import nn

from utils.errors import InputError
from utils.run.checkpoint import list_checkpoints, load_modules, load_optimizers, prune_checkpoints, write_checkpoint
from utils.run.manifest import Provenance, TrainingState, read_manifest
from utils.run.resume import find_start
from utils.run.snapshot import HostBuffers, Resumable, take_snapshot


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
    snapshot = take_snapshot(resumable(model, optimizer, ema), HostBuffers())
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


def test_an_ema_that_a_checkpoint_lacks_begins_with_the_model(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    save(tmp_path, 2, model, optimizer, None)
    ema = nn.Linear(3, 2)
    notices = load_modules(tmp_path / "checkpoint-2", resumable(nn.Linear(3, 2), optimizer, ema))
    assert notices == ["checkpoint-2 has no EMA: it begins with the weights of this step"]
    assert torch.equal(ema.weight, model.weight)


def test_the_optimizer_keeps_the_settings_of_the_config(tmp_path: Path) -> None:
    model, optimizer = trained(2)
    save(tmp_path, 2, model, optimizer, None)
    other = torch.optim.AdamW(model.parameters(), lr=0.3, betas=(0.5, 0.6), weight_decay=0.7)
    load_optimizers(tmp_path / "checkpoint-2", resumable(model, other, None))
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.5, 0.6), 0.7)
    assert other.state[model.weight]["step"] == 2
