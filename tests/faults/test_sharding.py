"""FSDP on two processes: the same numbers as without, resumable, and the same checkpoints."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from data.validation_data import ValidationPixels
from evaluation.sample_distance import SampleDistance
from evaluation.validator import save_sample_grid
from modeling.loading import load_generator, load_tokenizer
from modeling.sampling.image_sampler import exact_samples
from tests.conftest import make_noise_images
from tests.evaluation.test_validator import random_model
from tests.faults.runs import NO_DROPOUT, Run, assert_equal_runs
from tests.processes import run_ranks
from utils.config import load_config
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError
from utils.run import sharding
from utils.run.estimates import memory_estimate
from utils.run.metrics_file import read_metrics
from utils.run.status import EXIT_PREEMPTED
from utils.schema import TrainingConfig

pytestmark = pytest.mark.multiprocess
ON_CPU = pytest.mark.skipif(not sharding.SHARDS_ON_CPU, reason="this torch shards on GPUs only")


def assert_close(run: Run, oracle: Run) -> None:
    assert run.ids() == oracle.ids()
    torch.testing.assert_close(torch.tensor(run.curves()), torch.tensor(oracle.curves()), rtol=1e-5, atol=1e-5)
    ours, theirs = run.tensors(), oracle.tensors()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_a_torch_that_cannot_shard_on_a_cpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "SHARDS_ON_CPU", False)
    with pytest.raises(InputError, match=r"training\.fsdp=true: torch .* shards on GPUs only, found a CPU"):
        sharding.parallelize(
            torch.nn.Linear(1, 1), [], DistributedContext(0, 2, torch.device("cpu")), TrainingConfig(fsdp=True)
        )


@ON_CPU
def test_one_process_has_nothing_to_shard() -> None:
    with pytest.raises(InputError, match=r"training\.fsdp=true: found one process, expected several"):
        sharding.parallelize(
            torch.nn.Linear(1, 1), [], DistributedContext(0, 1, torch.device("cpu")), TrainingConfig(fsdp=True)
        )


@ON_CPU
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_not_sharded(pair_arguments: list[str], tmp_path: Path) -> None:
    run = Run([*pair_arguments, "training.fsdp=true", "optimizer.name=muon"], tmp_path / "run")
    assert run(processes=2) == [1, 1]
    assert "optimizer.name=muon: found training.fsdp=true, expected false" in run.output()
    assert not run.folder.exists()


@ON_CPU
def test_sharded_training_resumes_and_equals_replicated_training(
    pair_arguments: list[str], plain_oracle: Run, tmp_path: Path
) -> None:
    arguments = [*pair_arguments, *NO_DROPOUT, "training.fsdp=true"]
    whole = Run(arguments, tmp_path / "whole").completed(processes=2, TEST_SHARDS="1")
    counts = [re.search(r"(\d+) parameters, (\d+) of them here", whole.output(rank)).groups() for rank in range(2)]
    assert sum(int(local) for _, local in counts) == int(counts[0][0])  # each parameter is on one rank only
    assert int(counts[1][1]) > 0
    assert_close(whole, plain_oracle)
    parts = Run(arguments, tmp_path / "parts")
    parts("training.stop_steps=5", processes=2)
    parts.completed(processes=2)
    assert "steps 5 to 12" in parts.log()
    assert_equal_runs(parts, whole)


@pytest.mark.slow
@ON_CPU
def test_a_run_moves_between_sharded_and_replicated(
    pair_arguments: list[str], plain_oracle: Run, tmp_path: Path
) -> None:
    run = Run([*pair_arguments, *NO_DROPOUT], tmp_path / "run")
    run("training.stop_steps=4", processes=2)
    run(
        "training.stop_steps=8",
        "training.fsdp=true",
        "training.per_gpu_batch_size=2",
        "training.gradient_accumulation_steps=2",
        processes=2,
    )
    run.completed("training.per_gpu_batch_size=8")
    assert_close(run, plain_oracle)


@pytest.mark.slow
@ON_CPU
def test_ema_samples_and_validation_losses_are_those_of_replicated_training(
    pair_arguments: list[str], tiny_config_file: Path, tmp_path: Path
) -> None:
    """Validation losses are computed between updates of the EMA and must not affect it."""
    arguments = [
        *(*pair_arguments, *NO_DROPOUT, "training.use_ema=true", "training.ema_decay=0.5"),
        *("training.gradient_accumulation_steps=2", "training.per_gpu_batch_size=2", "experiment.generate_every=6"),
        *("experiment.eval_every=3", f"dataset.params.eval_pretokenization={tiny_config_file.parent / 'codes.jsonl'}"),
    ]
    images = f"dataset.params.eval_shards_path_or_url={make_noise_images(tmp_path / 'images', 2, 20, 24)}"
    samples = [images, "experiment.eval_samples=4", "sampling.per_gpu_batch_size=2"]
    replicated = Run(arguments, tmp_path / "replicated").completed(processes=2)
    sharded = Run([*arguments, "training.fsdp=true"], tmp_path / "sharded")
    sharded("training.stop_steps=6", processes=2)
    sharded.completed(*samples, processes=2)
    assert_close(sharded, replicated)
    rows = [
        [row for row in read_metrics(run.folder / "metrics.jsonl") if "val/ar_loss" in row]
        for run in (sharded, replicated)
    ]
    assert len(rows[0]) == 4
    for ours, theirs in zip(*rows, strict=True):
        assert ours["val/ar_loss"] == pytest.approx(theirs["val/ar_loss"], abs=1e-5)
        assert ours["val/ar_loss_noisy"] == pytest.approx(theirs["val/ar_loss_noisy"], abs=1e-5)
    emas = [load_file(run.folder / "checkpoint-12/ema.safetensors") for run in (sharded, replicated)]
    torch.testing.assert_close(*emas, rtol=1e-5, atol=1e-5)
    assert not torch.equal(emas[0]["lm_head.weight"], sharded.tensors()["lm_head.weight"])

    config = load_config([*sharded.arguments, *samples, f"experiment.output_dir={tmp_path}"])
    whole = load_generator(sharded.folder / "checkpoint-12/ema.safetensors", config.model)
    tokenizer = load_tokenizer(config)
    expected = save_sample_grid(whole, tokenizer, config, 12)
    for step in (6, 12):
        assert (sharded.folder / f"train_generated_images/{step:07d}.png").is_file()
    found = Image.open(sharded.folder / "train_generated_images/0000012.png")
    np.testing.assert_array_equal(found, expected)
    distance = SampleDistance(ValidationPixels(config), 4, 2, DistributedContext(0, 1, torch.device("cpu")))
    for name, value in distance(lambda rows: exact_samples(whole, tokenizer, rows, config)).items():
        assert rows[0][-1][name] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("micro_steps", "share"), [(1, 0.25), (2, 1)])
def test_the_estimate_has_whole_gradients_under_accumulation(micro_steps: int, share: float) -> None:
    module = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(module.parameters())
    estimate = memory_estimate({"model": module}, optimizers=[optimizer], shards=4, micro_steps=micro_steps)
    assert estimate.bytes_by_kind == {"weights": 20, "gradients": 80 * share, "optimizer": 40}


class CountedCollectives(TorchDispatchMode):
    """Counts collectives by name. (torch's CommDebugMode does too, but fails on FSDP's hooks in torch 2.11.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **kwargs or {})


def train_two_steps(arguments: list[str], output: Path, fsdp: bool, precision: str) -> None:
    """With accumulation of 3; writes losses, what was sent in each step, and the precision of a weight in its use."""
    config, types = load_config([*arguments, "experiment.output_dir=unused"]), []
    with init_distributed() as ctx:
        model, bf16 = random_model(config), precision == "bf16"
        training = TrainingConfig(fsdp=fsdp, mixed_precision="bf16" if bf16 else "no")
        parallel = sharding.parallelize(model, model.blocks, ctx, training)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.blocks[1].attn.qkv.register_forward_pre_hook(lambda module, _: types.append(str(module.weight.dtype)))
        random, losses, sent = torch.Generator().manual_seed(ctx.rank), [], []
        for _ in range(2):
            with CountedCollectives() as collectives:
                for micro_step in range(3):
                    codes, labels = torch.randint(24, (2, 16), generator=random), torch.tensor([0, 1])
                    with sharding.accumulating(parallel, micro_step == 2):
                        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                            output_ = parallel(codes, labels)
                        loss = sum(x.float().square().mean() for x in (output_.logits, *output_.projections.values()))
                        loss.backward()
                    losses.append(loss.item())
            if not fsdp:  # gradients are views of DDP's buckets, without a second copy
                assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}) <= 2
            optimizer.step()
            optimizer.zero_grad()
            sent.append(collectives.counts)
        torch.save({"losses": losses, "sent": sent, "types": types}, f"{output}.{ctx.rank}")


@ON_CPU
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradients_are_exchanged_once_per_step_and_blocks_are_gathered_in_the_precision(
    tiny_arguments: list[str], tmp_path: Path, precision: str, checkpointing: bool
) -> None:
    arguments = [*tiny_arguments, f"model.generator.use_checkpoint={checkpointing}"]
    for name, fsdp in (("sharded", True), ("replicated", False)):
        run_ranks(train_two_steps, arguments, tmp_path / name, fsdp, precision, processes=2)
    for rank in range(2):
        ours, theirs = torch.load(tmp_path / f"sharded.{rank}"), torch.load(tmp_path / f"replicated.{rank}")
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert set(ours["types"]) == {"torch.bfloat16" if precision == "bf16" else "torch.float32"}
        for step in ours["sent"]:
            assert sum(count for name, count in step.items() if "reduce_scatter" in name) == 3  # 2 blocks, the rest


@ON_CPU
def test_a_signal_stops_sharded_training_too(pair_arguments: list[str], tmp_path: Path) -> None:
    run = Run([*pair_arguments, *NO_DROPOUT, "training.fsdp=true"], tmp_path / "run")
    run.start(processes=2, TEST_SLOW="0.2")
    run.wait_for_step(3)
    os.kill(run.processes[1].pid, signal.SIGUSR1)
    assert run.wait() == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    assert run.status().status == "preempted"
    run.completed(processes=2)
