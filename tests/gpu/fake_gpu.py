"""A GPU that computes nothing: torch's FakeTensorMode knows shape, type and device of every tensor, and no values."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ModuleT = TypeVar("ModuleT", bound=nn.Module)
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "matmul", "linear", "convolution", "conv2d", "conv_transpose2d")


class FakeGpu(FakeTensorMode):
    """Inside `with`, "cuda" is a device whose tensors have no values; asking for one raises."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeGpu":
        return self  # a copied tensor is on the same GPU

    def put(self, module: ModuleT) -> ModuleT:
        """Move a module from the CPU; values are lost."""
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = self.like(tensor)
        return module

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of this shape and type, on the GPU."""
        with self:
            moved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


class Watch(TorchDispatchMode):
    """Inside `with`, every operation reads and writes tensors on the GPU only, of no other float type than these: no
    copy from or to the host, and no computation in a precision that costs more than it should.

    FakeTensorMode alone allows an index on the CPU, and knows nothing of precision.

    Attributes:
        products: float types of the results of matrix products and convolutions.
    """

    def __init__(self, *floats: torch.dtype) -> None:
        super().__init__()
        self.floats, self.products = floats, set[torch.dtype]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                assert tensor.device.type == "cuda", f"{func} with a tensor on {tensor.device}"
                assert not tensor.is_floating_point() or tensor.dtype in self.floats, f"{func} with {tensor.dtype}"
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products.add(result.dtype)
        return result


def attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """In place of `scaled_dot_product_attention`, which asks the GPU for its kind; as strict as its kernels."""
    assert q.dtype == keys.dtype == values.dtype
    scores = q @ keys.mT
    if mask is not None:
        assert mask.dtype == q.dtype
        scores = scores + mask
    return scores.softmax(dim=-1).to(values.dtype) @ values
