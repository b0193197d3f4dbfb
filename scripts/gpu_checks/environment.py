"""The first part: versions and device, from which the others know where they run."""

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from scripts.gpu_checks.findings import Figure, Findings, Machine
from utils.precision import matmul_precision
from utils.run.manifest import versions
from utils.run.run_environment import commit

NAME, GPUS, MEMORY = "device", "GPUs", "memory of the first, bytes"


def environment(findings: Findings, machine: Machine, work: Path) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    findings.figure(NAME, torch.cuda.get_device_name() if gpus else f"CPU, {platform.machine()}")
    findings.figure(GPUS, gpus)
    findings.figure(MEMORY, torch.cuda.get_device_properties(0).total_memory if gpus else 0)
    for name, value in {"commit": commit() or "unknown", **versions(), "triton": version_of("triton")}.items():
        findings.figure(name, value)
    findings.figure("C compiler", shutil.which("gcc") or shutil.which("cc") or "none")
    if gpus:
        findings.figure("CUDA of torch, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
        findings.figure("compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
        findings.figure("free memory of the first, bytes", torch.cuda.mem_get_info()[0])
    devices = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    for device in devices:
        findings.at_most(f"a matrix product on {device}, from float64, relative", product_error(device), 1e-5)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@matmul_precision(tf32=False)
def product_error(device: str) -> float:
    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double()
    return (((a.to(device) @ a.to(device)).cpu() - exact).norm() / exact.norm()).item()


def machine_of(figures: list[Figure]) -> Machine:
    """What this part has found; a CPU if it has not come so far."""
    values = {figure.name: figure.value for figure in figures}
    return Machine(str(values.get(NAME, "unknown")), int(values.get(GPUS, 0)), int(values.get(MEMORY, 0)))
