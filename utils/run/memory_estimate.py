"""What a run will need, told before its first step."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from utils.run.checkpoint import MODEL
from utils.run.performance import GIB
from utils.run.snapshot import Optimizers

MOMENTS = 2  # of Adam, each as large as the parameters


@dataclass
class MemoryEstimate:
    """Bytes on each device, by part.

    Attributes:
        parameters: of the model.
        checkpoint_bytes: of a checkpoint on disk.
    """

    parameters: int
    parts: dict[str, float]
    checkpoint_bytes: float

    @classmethod
    def of(
        cls,
        modules: Mapping[str, nn.Module],
        optimizers: Optimizers,
        shards: int,
        activation_bytes: float | None,
        micro_steps: int = 1,
    ) -> "MemoryEstimate":
        """
        Args:
            modules: as in a checkpoint, not sharded yet or sharded.
            shards: over so many devices they are sharded.
            activation_bytes: of a micro-batch, estimated; None: not told.
            micro_steps: with more than one, gradients are whole between them.
        """
        sizes = {name: _num_bytes(module.state_dict().values()) for name, module in modules.items()}
        gradients = sum(_num_bytes(module.parameters()) for module, _ in optimizers.values())
        parts: dict[str, float] = {"weights": sizes[MODEL], "gradients": gradients, "optimizer": MOMENTS * gradients}
        parts |= {name: size for name, size in sizes.items() if name != MODEL}
        whole = {"gradients"} if micro_steps > 1 else set()
        parts = {name: size if name in whole else size / shards for name, size in parts.items()}
        if activation_bytes is not None:
            parts["activations"] = activation_bytes
        parameters = sum(p.numel() for p in modules[MODEL].parameters())
        return cls(parameters, parts, sum(sizes.values()) + MOMENTS * gradients)

    def __str__(self) -> str:
        told = [f"{name} {size / GIB:.2f}" for name, size in self.parts.items()]
        return (
            f"{self.parameters / 1e6:.1f} M parameters; memory of each process in GiB, estimated: {', '.join(told)}, "
            f"together {sum(self.parts.values()) / GIB:.2f}"
        )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
