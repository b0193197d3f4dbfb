"""What a training step does around the model: its batch comes from pinned memory in copies that nothing waits for, and
the host reads from the GPU once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from data import loading, training_batches
from data.loading import Batch
from data.training_batches import TrainingBatches, open_training_data
from modeling.perturbation import num_perturbation_uniforms
from modeling.rear import ReAR
from tests.conftest import make_noise_images
from tests.gpu.fake_gpu import FakeGpu, Watch
from tests.gpu.test_faults import plant
from utils.config import load_config
from utils.distributed import DistributedContext
from utils.optim import MovingAverage, build_optimizers
from utils.run.sharding import clip_gradients
from utils.run.training_run import flags_of_any_rank
from utils.schema import Config

CUDA = DistributedContext(0, 1, torch.device("cuda"))


class Pinning(DataLoader):
    """As torch's with a GPU: without one, it pins nothing."""

    def __init__(self, *arguments: Any, pin_memory: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pins = pin_memory

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield {name: values.pin_memory() for name, values in batch.items()} if self.pins else batch


class Copies(TorchDispatchMode):
    """Inside `with`, nothing waits for a copy to the GPU.

    Attributes:
        number: of such copies.
    """

    number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            assert (kwargs or {}).get("non_blocking"), "a copy that waits"
            self.number += 1
        return result


@pytest.fixture
def to_gpu(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tiny_arguments: list[str], tmp_path: Path) -> Any:
    """A function that reads a batch of codes or images and sends it to the GPU."""
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def on_device(batch: Batch, device: torch.device) -> Batch:
        assert all(any(tensor is copy for copy in pinned) for tensor in batch.values()), "memory that is not pinned"
        on_host = {name: gpu.from_tensor(tensor) for name, tensor in batch.items()}
        with gpu, Copies() as copies:
            moved = loading.on_device(on_host, device)
        assert copies.number == len(batch)
        return moved

    def read(form: str) -> Batch:
        config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
        if form == "images":
            config.dataset.params.train_shards_path_or_url = str(make_noise_images(tmp_path / "images", 4, 20, 24))
            config.dataset.params.pretokenization = None
        dataset = open_training_data(config, "", verify=False)
        return next(
            TrainingBatches(dataset, config, CUDA, 1, range(1), 0, lambda: False, num_perturbation_uniforms(16))
        )

    monkeypatch.setattr(loading, "DataLoader", Pinning)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(training_batches, "on_device", on_device)
    return read


@pytest.mark.parametrize("form", ["codes", "images"])
def test_batches_are_pinned_and_nothing_waits_for_their_copies(to_gpu: Any, form: str) -> None:
    batch = to_gpu(form)
    assert batch.keys() == {
        "class_labels",
        "class_rows",
        "index",
        "perturbation_uniforms",
        "codes" if form == "codes" else "image",
    }
    assert {tensor.device.type for tensor in batch.values()} == {"cuda"}


@pytest.mark.parametrize(
    ("place", "name", "found", "fault"),
    [
        (loading, "on_device", "non_blocking=True", "non_blocking=False"),
        (loading.Batches, "__init__", "pin_memory=pin_memory", "pin_memory=False"),
        (TrainingBatches, "__init__", "on_gpu, stop_requested", "False, stop_requested"),
    ],
)
def test_a_copy_that_waits_is_found(
    to_gpu: Any, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, found: str, fault: str
) -> None:
    plant(monkeypatch, place, name, found, fault)
    with pytest.raises(AssertionError, match=r"that waits|not pinned"):
        to_gpu("codes")


def test_the_host_reads_once(gpu: FakeGpu, model: ReAR, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all that follows the backward pass: the flags of all ranks, in one piece."""
    reads: list[tuple[int, ...]] = []

    def tolist(tensor: Tensor) -> list[float]:
        reads.append(tuple(tensor.shape))
        return [0.0] * len(tensor)

    with gpu:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer = build_optimizers(model, config)["optimizer"]
        ema = MovingAverage(model, 0.99)
        loss = torch.zeros((), device="cuda")
        monkeypatch.setattr(FakeTensor, "tolist", tolist)
        with Watch(torch.float32):
            grad_norm = clip_gradients(model, 1.0)
            nonfinite = ~torch.isfinite(torch.stack([loss, loss, grad_norm])).all()
            assert flags_of_any_rank(CUDA, nonfinite, [False, False, False]) == [False] * 4
            optimizer.step()
            ema.update(model, age=0)
    assert reads == [(4,)]
