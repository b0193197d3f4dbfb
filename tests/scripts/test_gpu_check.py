"""The check of a GPU, on a CPU: what passes, what is skipped, and that planted faults fail without ending the rest."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.rear import ReAR
from modeling.sampling.generate import generate
from scripts import gpu_check
from scripts.benchmarks.rounding_ties import FLOAT32_GAP, largest_gap
from scripts.gpu_checks import numerics, training
from scripts.gpu_checks.findings import Findings, Machine, read_findings
from tests.docs import test_pages
from tests.processes import SERVER, STARTED, WAIT_S
from utils.randomness import image_uniforms
from utils.schema import ModelConfig

ROOT = Path(__file__).parents[2]
NEED_A_GPU = {("graphs", ""), ("copies", ""), ("memory", "memory with activation checkpointing, by that without")}
NEED_A_GPU |= {("evaluator", "FID, Inception Score, precision and recall")}
WITHOUT = """
import importlib.metadata, sys
ABSENT = ("wandb", "webdataset")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
distribution = importlib.metadata.distribution
def without(name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)
importlib.metadata.distribution = without
"""


def results(out: Path) -> dict[str, set[str]]:
    """The results of each part."""
    found: dict[str, set[str]] = {}
    for row in json.loads((out / "gpu_check.json").read_text())["findings"]:
        found.setdefault(row["part"], set()).add(row["result"])
    return found


def skipped(out: Path) -> set[tuple[str, str]]:
    rows = json.loads((out / "gpu_check.json").read_text())["findings"]
    return {(row["part"], row["what"]) for row in rows if row["result"] == "SKIPPED" and row["found"]}


def check_alone(out: Path, parts: list[str], **environment: str) -> subprocess.CompletedProcess:
    """The command, in a Python without wandb and webdataset and with nothing on its path but the root."""
    absent = out.parent / "absent"
    absent.mkdir()
    (absent / "sitecustomize.py").write_text(WITHOUT)
    command = ["bash", str(ROOT / "scripts_bash/gpu_check.sh"), str(out), *(["--parts", *parts] if parts else [])]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(absent), **environment}
    return subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True)


@pytest.mark.multiprocess
def test_the_command_without_wandb_and_webdataset(tmp_path: Path) -> None:
    parts = ["graphs", "batches", "training", "memory", "speed-decode"]
    kept = tmp_path / "out" / "work" / "metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("of a run")
    result = check_alone(tmp_path / "out", parts)
    assert result.returncode == 0, result.stdout + result.stderr
    found = results(tmp_path / "out")
    assert list(found) == ["environment", *parts]
    assert found["graphs"] == {"SKIPPED"}
    assert all("PASS" in kinds for part, kinds in found.items() if part != "graphs")
    assert skipped(tmp_path / "out") == {pair for pair in NEED_A_GPU if pair[0] in parts}
    assert "SKIPPED graphs: CUDA graphs need a GPU\n" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.json", "gpu_check.md", "logs", "work"}
    assert kept.read_text() == "of a run"

    page = tmp_path / "out/gpu_check.md"  # may stand in docs/benchmarks
    test_pages.test_links_lead_somewhere(page)
    test_pages.test_named_files_and_folders_exist(page)
    test_pages.test_named_keys_exist(page)
    text = page.read_text()
    assert "| losses of steps 31 to 60, resumed from uninterrupted, relative | 0 |" in text
    assert "| training | PASS | weights at the end, resumed and uninterrupted | 0 of" in text
    assert "| speed-decode | decoding, images/s |" in text


@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_parts(tmp_path: Path) -> None:
    result = check_alone(tmp_path / "out", [])
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "out/gpu_check.json").read_text())["figures"]
    assert [figure["part"] for figure in figures if figure["name"] == "took, s"] == list(gpu_check.PARTS)
    assert skipped(tmp_path / "out") - {("two-ranks", "FSDP2")} == NEED_A_GPU  # torch 2.6 has FSDP2 on GPUs only


def run_check(plant: Callable[[Path], None], out: Path, parts: list[str]) -> dict[str, set[str]]:
    """In a process of its own, forked without the threads of this one; something fails in it."""
    process = SERVER.Process(target=_planted, args=(plant, out, parts))
    process.start()
    STARTED.append(process)
    process.join(WAIT_S)
    assert process.exitcode == 1
    return results(out)


def _planted(plant: Callable[[Path], None], out: Path, parts: list[str]) -> None:
    plant(out)
    raise SystemExit(gpu_check.main([str(out), "--parts", *parts]))


def plant_wrong_weight(out: Path) -> None:
    numerics.FIXTURES = Path(shutil.copytree(ROOT / "tests/fixtures", out / "fixtures"))
    weights = numerics.FIXTURES / "rear_tiny.safetensors"
    state = load_file(weights)
    state["blocks.1.mlp.fc1.weight"][0, 0] += 0.1
    save_file(state, weights)


def plant_crash_and_hang(out: Path) -> None:
    def crash(findings, machine, work) -> None:
        findings.at_most("before the crash", 0, 1)
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(findings, machine, work) -> None:
        if os.fork() == 0:
            (out / "child").write_text(str(os.getpid()))
        time.sleep(1000)

    def over(findings, machine, work) -> None:
        raise AssertionError("it begins when the time is over")

    gpu_check.PARTS["graphs"], gpu_check.PARTS["batches"] = (crash, WAIT_S), (hang, 2)
    gpu_check.PARTS["ranks"] = (over, WAIT_S)
    original = gpu_check.run_part

    def run_part(check, *arguments) -> None:
        original(check, *arguments)
        if check is hang:
            gpu_check.TOTAL_S = 0

    gpu_check.run_part = run_part


def test_a_wrong_weight_fails_and_later_parts_run(tmp_path: Path) -> None:
    found = run_check(plant_wrong_weight, tmp_path, ["model", "batches"])
    assert "FAIL" in found["model"]
    assert found["batches"] == {"PASS"}
    assert (
        "| model | FAIL | logits of a noisy context as by the published code |"
        in (tmp_path / "gpu_check.md").read_text()
    )


def test_a_crash_and_a_hang_do_not_end_the_others(tmp_path: Path) -> None:
    found = run_check(plant_crash_and_hang, tmp_path, ["graphs", "batches", "ranks"])
    assert found["graphs"] == {"PASS", "FAIL"}
    assert found["batches"] == {"FAIL"}
    assert found["ranks"] == {"SKIPPED"}
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| graphs | FAIL | runs to its end | ended by SIGSEGV |" in text
    assert "| batches | FAIL | runs to its end | still running after 2 s, killed |" in text
    stat = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"  # killed, and nobody has asked how it ended


@pytest.mark.parametrize(
    ("copy", "result", "found"),
    [
        ("Memcpy HtoD (Pinned -> Device)", "PASS", "0 of 3"),
        ("Memcpy HtoD (Pageable -> Device)", "FAIL", "3 of 3"),
        ("a trace without copies", "FAIL", "0 of 0"),
    ],
)
def test_copies_in_the_trace_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: str, result: str, found: str
) -> None:
    """Of a training run that is made up, as is its GPU."""
    names = [copy, "Memcpy DtoH (Device -> Pageable)", "aten::copy_", "cudaMemcpyAsync"]

    def run(self: training.Run, steps: int, profile: str) -> training.Run:
        assert (steps, profile) == (9, "training.profile=5:8")
        (self.folder / "profile").mkdir(parents=True)
        with gzip.open(self.folder / "profile/trace.json.gz", "wt") as file:
            json.dump({"traceEvents": [{"ph": "M"}, *({"name": name} for name in names * 3)]}, file)
        return self

    monkeypatch.setattr(training, "made_up_project", lambda machine, work: [])
    monkeypatch.setattr(training.Run, "__call__", run)
    training.copies(Findings("copies", tmp_path / "findings"), Machine("", 1, 0), tmp_path)
    (finding,), (to_host,) = read_findings(tmp_path / "findings")
    assert (finding.result, finding.found) == (result, found)
    assert to_host.value == 1


def test_what_is_forked_has_not_asked_for_a_gpu(tmp_path: Path) -> None:
    """CUDA does not survive a fork: the imports come before the parts, and a made-up project before the ranks."""
    code = """
import sys, torch
from pathlib import Path
def refuse(*_): raise SystemExit("CUDA was asked")
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name): setattr(torch._C, name, refuse)
import scripts.gpu_check
from scripts.gpu_checks.project import Machine, made_up_project
made_up_project(Machine("", 0, 0), Path(sys.argv[1]))
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_close_calls(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    """Another code is explained where the uniform lies at an edge, and nowhere else."""
    labels, uniforms = torch.tensor([0, 3, 2]), image_uniforms(0, [0, 1, 2], 16)
    codes = generate(tiny_model, labels, uniforms, tiny_config.generator)

    def gap(others: torch.Tensor, at: torch.Tensor = uniforms) -> float:
        return largest_gap(tiny_model, labels, at, codes, others, tiny_config.generator)

    assert gap(codes) == 0
    other = codes.clone()
    other[1, 5] = (codes[1, 5] + 12) % 24
    other[1, 9] = 0  # behind the first difference, and of no account
    assert gap(other) > FLOAT32_GAP
    assert gap(torch.full_like(codes, 24)) == float("inf")
    low, high = 0.0, 1.0  # the edge above code (1, 0), by bisection
    for _ in range(40):
        middle = (low + high) / 2
        moved = uniforms.clone()
        moved[1, 0] = middle
        chosen = generate(tiny_model, labels, moved, tiny_config.generator)[1, 0]
        low, high = (middle, high) if chosen <= codes[1, 0] else (low, middle)
    moved[1, 0], other = low, codes.clone()
    other[1, 0] += 1
    assert gap(other, moved) < 1e-5
