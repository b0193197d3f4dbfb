"""Compile for an NVIDIA GPU on a machine without one, and count what would run there.

Tensors are fake: they have shapes, types and a device, and no values. Dynamo, AOTAutograd and Inductor are torch's own,
and Triton's ptxas turns the generated kernels into machine code for Hopper; nothing is launched. What torch and Triton
ask the driver is answered here. This relies on internals of torch, so a release may need changes here, and it affects
the whole process: use it in a process of its own (`python scripts/benchmark.py kernels`).

torch's autograd engine asks the driver about every CUDA tensor, even a fake one. So training is traced on fake CPU
tensors, with CUDA's rules of autocast and CUDA's attention, and its graphs are moved to the GPU before Inductor sees
them.
"""

import math
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils._triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

HOPPER = types.SimpleNamespace(  # properties of an H200 that compilers ask for
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150 * 10**9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
    L2_cache_size=50 * 2**20,
)
GPU = torch.device("cuda", 0)
CAPABILITY = HOPPER.major, HOPPER.minor
PTX_ARCHITECTURE = f"sm_{HOPPER.major}{HOPPER.minor}a"


@dataclass
class Launch:
    """One kernel launch."""

    kind: str  # triton; library: of cuBLAS, cuDNN, attention or ATen, in a compiled graph; eager: outside of any
    name: str
    bytes: float  # read and written
    flops: float  # of matrix products, convolutions and attention
    float32: int = 0  # elements of the largest float32 tensor that it writes


@dataclass
class CompiledGraph:
    """A compiled function: all of it, or its forward or backward pass."""

    name: str
    launches: list[Launch]
    sources: list[tuple[str, str]]  # name and source of each Triton kernel
    problems: list[str]  # what must not be in it: float64, other devices
    code: str = ""  # Inductor's Python program, which launches all of it


@dataclass
class Ledger:
    """What ran inside `GpuCompiler.counting`."""

    launches: list[Launch] = field(default_factory=list)
    graphs: list[CompiledGraph] = field(default_factory=list)  # each once


class FakeGpu(FakeTensorMode):
    """Copies of a fake tensor belong to the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "FakeGpu":
        return self


class GpuCompiler:
    """Compiles and counts; `with GpuCompiler() as compiler` answers in place of the driver until its end.

    Attributes:
        fake: mode of the fake tensors.
    """

    def __init__(self) -> None:
        self.fake = FakeGpu()
        self._stack = ExitStack()
        self._ledgers: list[Ledger] = []

    def __enter__(self) -> "GpuCompiler":
        from torch._inductor import config as inductor_config

        enter = self._stack.enter_context
        enter(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False))
        enter(mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True))
        enter(mock.patch.object(torch, "compile", self._compile))
        enter(mock.patch.object(F, "scaled_dot_product_attention", attention))
        enter(mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor))  # it looks at values
        enter(inductor_config.patch(joint_graph_constant_folding=False))  # it would compute on the GPU
        enter(cuda_autocast_on_cpu())
        enter(self.fake)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def put(self, module: nn.Module, device: str = "cuda", dtype: torch.dtype | None = None) -> Any:
        """Move a module, and convert its float tensors to a type; values are lost."""
        for part in module.modules():
            groups: tuple[dict[str, Any], ...] = part._parameters, part._buffers
            for tensors in groups:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                        moved = torch.empty(tensor.shape, dtype=kept, device=device)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        tensors[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
        return module

    @contextmanager
    def counting(self) -> Iterator[Ledger]:
        """Counts the launches of what runs inside, compiled or not."""
        ledger = Ledger()
        self._ledgers.append(ledger)
        counter = EagerCounter(ledger)
        try:
            with counter:
                yield ledger
        finally:
            self._ledgers.remove(ledger)

    def _compile(self, function: Callable | None = None, **options: Any) -> Any:
        """In place of `torch.compile`: a graph break, a wait for a value and a branch on one are errors."""
        from torch._inductor.compile_fx import compile_fx

        owner = getattr(function, "__self__", None)  # `nn.Module.compile` compiles a method
        name = type(owner).__name__ if owner is not None else getattr(function, "__name__", type(function).__name__)
        inner_compile: Any = partial(self._inner_compile, name)

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            return compile_fx(graph, inputs, inner_compile=inner_compile, config_patches=options.get("options"))

        return COMPILE(function, backend=backend, fullgraph=True)

    def _inner_compile(self, name: str, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable:
        is_inference, is_backward = (bool(options.get(mode, False)) for mode in ("is_inference", "is_backward"))
        if not is_inference:
            name += ", backward" if is_backward else ", forward"
        with _disable_current_modes():  # of `fake` and of counting; the graph has a mode of its own
            compiled = lower(name, graph, inputs, is_inference=is_inference, is_backward=is_backward)
        for ledger in self._ledgers:
            ledger.graphs.append(compiled)

        def run(arguments: list[Any]) -> Any:
            for ledger in self._ledgers:
                ledger.launches += compiled.launches
            with uncounted():
                return graph.forward(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


class EagerCounter(TorchDispatchMode):
    """Adds a launch for each operation that is not compiled and computes something."""

    active = True

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    @classmethod
    def is_infra_mode(cls) -> bool:  # otherwise Dynamo refuses to compile inside it
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not EagerCounter.active or func.namespace != "aten":
            return func(*args, **kwargs)
        with self:  # a composite operation is counted by its parts
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not (func.is_view or name in NO_KERNEL):
            read = [args[1:] if name in GATHERS else args, kwargs]  # of a table, only what is gathered
            written = read if name in SCATTERS else result  # into a buffer
            moved = sum(nbytes(tensor) for tensor in tree_leaves([read, written]) if isinstance(tensor, Tensor))
            flops = flop_registry.get(func.overloadpacket)
            work = flops(*args, **kwargs, out_val=result) if flops else 0
            results = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
            largest = max((one.numel() for one in results if one.dtype == torch.float32), default=0)
            self.ledger.launches.append(Launch("eager", name, moved, work, largest))
        return result


NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "detach", "_unsafe_view", "lift_fresh", "set_"}
SCATTERS = {"index_copy_", "scatter_"}
GATHERS = {"index_select", "embedding", "gather", *SCATTERS}


def nbytes(tensor: Tensor) -> int:
    """Bytes of the tensor, counting an element that it repeats once."""
    elements = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return elements * tensor.element_size()


@contextmanager
def uncounted() -> Iterator[None]:
    EagerCounter.active = False
    try:
        yield
    finally:
        EagerCounter.active = True


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` with the kernel that a GPU would choose; torch would ask it."""
    if query.dtype == torch.float32 or attn_mask is not None:
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        log_sums = query.requires_grad
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, log_sums, dropout_p, is_causal, scale=scale
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


COMPILE = torch.compile


@contextmanager
def cuda_autocast_on_cpu() -> Iterator[None]:
    """Inside, layer norms under autocast on a CPU are computed in float32, as on CUDA; products are in bf16 on both."""
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def in_float32(
        x: Tensor,
        shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Tensor:
        weight, bias = (None if parameter is None else parameter.float() for parameter in (weight, bias))
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return torch.ops.aten.layer_norm(x.float(), shape, weight, bias, eps, cudnn_enable)

    library = torch.library.Library("aten", "IMPL")
    library.impl("layer_norm", in_float32, "AutocastCPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def lower(
    name: str, graph: torch.fx.GraphModule, inputs: list[Any], is_inference: bool, is_backward: bool
) -> CompiledGraph:
    """Let Inductor generate the GPU's code of a graph of ATen operations, whose inputs are fake tensors."""
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    graph = copy_to_gpu(graph)
    inputs = tree_map_only(Tensor, on_gpu, inputs)
    problems = found_problems(graph)
    modes: dict[str, Any] = {"is_inference": is_inference, "is_backward": is_backward}
    with driver_answers(), torch.no_grad():
        fake_mode = next(tensor.fake_mode for tensor in inputs if isinstance(tensor, FakeTensor))
        compile_fx.view_to_reshape(graph)
        compile_fx._recursive_record_original_output_strides(graph)
        with V.set_fake_mode(fake_mode):
            compile_fx._recursive_post_grad_passes(graph, is_inference=is_inference)
        lowering = GraphLowering(graph, inputs, compile_fx.shape_env_from_inputs(inputs), **modes)
        with V.set_fake_mode(fake_mode), V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
            found = [launch_of(node) for node in lowering.scheduler.nodes]
    source = str(getattr(code, "value", code))
    launches = [launch for launch in found if launch is not None]
    # A combination of independent kernels can be more than one launch; its bytes are those of the first.
    calls = len(re.findall(r"^ +triton_\w+\.run\(", source, re.M))
    launches += [Launch("triton", "another part", 0, 0)] * (calls - sum(one.kind == "triton" for one in launches))
    sources = re.findall(
        r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", source, re.M | re.S
    )
    if lowering.device_types != {"cuda"}:
        problems.append(f"computes on {sorted(lowering.device_types)}, expected cuda only")
    return CompiledGraph(name, launches, sources, problems, source)


def on_gpu(tensor: Tensor) -> Tensor:
    """A fake GPU tensor like a fake tensor on any device."""
    with tensor.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda")


def copy_to_gpu(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    copied = torch.fx.Graph()
    values: dict[torch.fx.Node, Any] = {}
    output = copied.graph_copy(graph.graph, values)
    copied.output(output)
    for node in copied.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, on_gpu, node.meta["val"])
        node.args, node.kwargs = tree_map_only(torch.device, lambda _: GPU, (node.args, node.kwargs))
    copied.find_nodes(op="output")[0].meta.update(graph.graph.output_node().meta)
    return torch.fx.GraphModule(graph, copied)


def found_problems(graph: torch.fx.GraphModule) -> list[str]:
    """Tensors of a graph that must not be there."""
    problems = []
    for node in graph.graph.nodes:
        for tensor in tree_leaves(node.meta.get("val")):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                problems.append(f"{node.name}: {tensor.dtype}")
    return problems


def launch_of(node: Any) -> Launch | None:
    """What a node of Inductor's scheduler launches."""
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return None
    if isinstance(node, ExternKernelSchedulerNode):
        name = str(getattr(node.node, "python_kernel_name", None) or type(node.node).__name__)
        moved = sum(node.get_read_write_buffer_accesses(include_reads=True, include_writes=True).values())
        work = flops_of(node.node.get_origin_node())
        return Launch("library", name.removeprefix("extern_kernels."), moved, work, largest_float32(node))
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    parts = [part.get_read_write_buffer_accesses(include_reads=True, include_writes=True) for part in node.get_nodes()]
    # Of a table, only what is gathered: a fused kernel would be taken to read all of it.
    moved = sum(min(count, max(part.get(name, 0) for part in parts)) for name, count in accesses.items())
    origins = sorted({origin.name for part in node.get_nodes() for origin in part.node.get_origins()})
    return Launch("triton", ", ".join(origins), moved, 0, largest_float32(node))


def largest_float32(node: Any) -> int:
    """Elements of the largest float32 buffer that a node of Inductor's scheduler writes to memory; attention and other
    library calls with several results are not looked at."""
    from torch._inductor.virtualized import V

    written = node.get_read_write_buffer_accesses(include_reads=False, include_writes=True)
    sizes = [size for name, size in written.items() if V.graph.name_to_buffer[name].maybe_get_dtype() == torch.float32]
    return max(sizes, default=0) // torch.float32.itemsize


def flops_of(node: torch.fx.Node | None) -> float:
    """Of an ATen operation; sizes that are symbols have the values that they were traced with."""
    flops = None if node is None else flop_registry.get(getattr(node.target, "overloadpacket", None))
    if node is None or flops is None:
        return 0
    args, kwargs = tree_map_only(torch.fx.Node, lambda argument: argument.meta["val"], (node.args, node.kwargs))
    found = flops(*args, **kwargs, out_val=node.meta["val"])
    return cast(float, found.node.hint if isinstance(found, torch.SymInt) else found)  # int(found) would fix the symbol


@contextmanager
def driver_answers() -> Iterator[None]:
    """What Inductor and Triton ask an H200's driver."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: HOPPER,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda device=None: None,
    }
    only_cuda: dict[str, Callable[..., Any]] = {"get_device_capability": lambda device=None: CAPABILITY}
    only_interface: dict[str, Callable[..., Any]] = {
        "get_compute_capability": lambda device=None: CAPABILITY[0] * 10 + CAPABILITY[1],
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "get_raw_stream": lambda device=None: 0,
    }
    triton_driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", CAPABILITY[0] * 10 + CAPABILITY[1], HOPPER.warp_size),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
        is_active=lambda: True,
    )
    with ExitStack() as stack:
        for name, answer in {**answers, **only_cuda}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name, answer in {**answers, **only_interface}.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer)))
        for name in ("current_device", "get_device_properties"):
            stack.enter_context(mock.patch.object(CudaInterface.Worker, name, staticmethod(answers[name])))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", return_value=None))
        stack.enter_context(config.patch(compile_threads=1))
        driver.set_active(triton_driver)
        for cached in vars(torch.utils._triton).values():  # found without a GPU
            getattr(cached, "cache_clear", lambda: None)()
        yield


@dataclass
class MachineCode:
    """What ptxas says about a kernel."""

    registers: int
    spilled_bytes: int  # stores and loads


def machine_code(name: str, source: str) -> MachineCode:
    """Compile a generated kernel as Inductor would at its first launch, in the first of its configurations.

    Raises:
        RuntimeError: Triton or ptxas refuses the kernel.
    """
    import triton
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache

    with driver_answers(), config.patch(use_static_cuda_launcher=False):
        autotuner = getattr(PyCodeCache.load(source), name)
        binary = autotuner._precompile_config(autotuner.configs[0]).kernel
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx", encoding="utf-8") as ptx:
        ptx.write(binary.asm["ptx"])
        ptx.flush()
        command = [str(ptxas), "-v", f"--gpu-name={PTX_ARCHITECTURE}", ptx.name, "-o", "/dev/null"]
        output = subprocess.run(command, capture_output=True, check=True).stderr.decode()
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill", output))
    return MachineCode(int(re.findall(r"Used (\d+) registers", output)[0]), spills)
