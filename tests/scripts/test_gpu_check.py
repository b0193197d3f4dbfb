"""scripts/gpu_check.py on a CPU: its table; checks that fail, crash or hang fail alone and do not end the others."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts import gpu_check
from tests.docs import test_pages
from tests.gpu.checks import test_numerics, test_training
from tests.gpu.checks.conftest import Report
from tests.processes import ROOT, WAIT_S

NEED_A_GPU = {("graphs", ""), ("copies", ""), ("memory", "memory with activation checkpointing by that without")}
NEED_A_GPU |= {("attention", "kernels of the attention"), ("evaluator", "FID, Inception Score, precision and recall")}
FAILING = """
import pytest
from tests.gpu.checks.conftest import report

@pytest.mark.gpu
def test_fails(report):
    report.at_most("too large", 2, 1)
    report.at_most("small enough", 0, 1)
    report.figure("speed", 3.0, "4")
"""
ENDING = """
import os, signal, subprocess, time, pytest

@pytest.mark.gpu
def test_raises():
    raise KeyError("absent")

@pytest.mark.gpu
def test_crashes():
    os.kill(os.getpid(), signal.SIGSEGV)

@pytest.mark.gpu
def test_hangs():
    child = subprocess.Popen(["sleep", "1000"])
    with open(CHILD, "w") as file:
        file.write(str(child.pid))
    time.sleep(1000)
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


def run_command(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    """As a user types it, without PYTHONPATH."""
    command = ["bash", str(ROOT / "scripts_bash/gpu_check.sh"), str(out), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True)


@pytest.mark.multiprocess
def test_the_command_writes_a_table(tmp_path: Path) -> None:
    kept = tmp_path / "out" / "work" / "metrics.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("of a run")
    result = run_command(tmp_path / "out", "--parts", "model", "graphs", "batches")
    assert result.returncode == 0, result.stdout + result.stderr
    assert results(tmp_path / "out") == {
        "environment": {"PASS"},
        "model": {"PASS"},
        "graphs": {"SKIPPED"},
        "batches": {"PASS"},
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.json", "gpu_check.md", "logs", "work"}
    assert kept.read_text() == "of a run"
    page = tmp_path / "out/gpu_check.md"  # may be committed to docs/benchmarks
    test_pages.test_links_lead_somewhere(page)
    test_pages.test_named_files_and_folders_exist(page)
    test_pages.test_named_keys_exist(page)
    assert "| batches | PASS | codes of a batch of 12, sampled again | 0 of" in page.read_text()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = {name: (test, 100 * limit) for name, (test, limit) in gpu_check.PARTS.items()}
    monkeypatch.setattr(gpu_check, "PARTS", patient)
    monkeypatch.setattr(gpu_check, "TOTAL_S", 100 * gpu_check.TOTAL_S)
    assert gpu_check.main([str(tmp_path)]) == 0, (tmp_path / "gpu_check.md").read_text()
    figures = json.loads((tmp_path / "gpu_check.json").read_text())["figures"]
    assert [figure["part"] for figure in figures if figure["name"] == "took, s"] == list(gpu_check.PARTS)
    assert skipped(tmp_path) - {("two-ranks", "FSDP2")} == NEED_A_GPU  # torch 2.6 has FSDP2 on GPUs only


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing, ending = tmp_path / "test_failing.py", tmp_path / "test_ending.py"
    failing.write_text(FAILING)
    ending.write_text(f"CHILD = {str(tmp_path / 'child')!r}\n{ENDING}")
    parts = {
        "hangs": (f"{ending}::test_hangs", 12),
        "fails": (f"{failing}::test_fails", WAIT_S),
        "raises": (f"{ending}::test_raises", WAIT_S),
        "crashes": (f"{ending}::test_crashes", WAIT_S),
        "absent": (f"{ending}::test_absent", WAIT_S),
    }
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    out = tmp_path / "out"
    assert gpu_check.main([str(out)]) == 1
    ended = {"hangs": {"FAIL"}, "raises": {"FAIL"}, "crashes": {"FAIL"}, "absent": {"FAIL"}}
    assert results(out) == ended | {"fails": {"FAIL", "PASS"}}
    text = (out / "gpu_check.md").read_text()
    assert "| hangs | FAIL | runs to its end | still running after 12 s" in text
    assert "| fails | FAIL | too large | 2 | at most 1 |" in text
    assert "| raises | FAIL | runs to its end | KeyError: 'absent' |" in text
    assert "| crashes | FAIL | runs to its end | ended by SIGSEGV" in text
    assert "| fails | speed | 3 |" in text
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"  # killed

    monkeypatch.setattr(gpu_check, "TOTAL_S", 0)
    assert gpu_check.main([str(out)]) == 0
    assert all(found == {"SKIPPED"} for found in results(out).values())


def test_a_wrong_weight_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        test_numerics, "FIXTURES", Path(shutil.copytree(ROOT / "tests/fixtures", tmp_path / "fixtures"))
    )
    weights = tmp_path / "fixtures/rear_tiny.safetensors"
    state = load_file(weights)
    state["blocks.1.mlp.fc1.weight"][0, 0] += 0.1
    save_file(state, weights)
    report = Report(lambda name, value: None)
    test_numerics.test_model(report)
    failed = {line.partition(":")[0] for line in report.failed}
    assert "logits of a perturbed context against the published code" in failed
    assert "guided_logits of cached decoding against the published code" in failed


@pytest.mark.parametrize(
    ("copy", "failed"),
    [
        ("Memcpy HtoD (Pinned -> Device)", []),
        ("Memcpy HtoD (Pageable -> Device)", ["3 of 3"]),
        ("a trace without copies", ["0 of 0"]),
    ],
)
def test_copies_in_the_trace_are_counted(tmp_path: Path, copy: str, failed: list[str]) -> None:
    names = [copy, "Memcpy DtoH (Device -> Pageable)", "aten::copy_", "cudaMemcpyAsync"]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": [{"ph": "M"}, *({"name": name} for name in names * 3)]}, file)
    rows = []
    report = Report(lambda name, value: rows.append(json.loads(value)))
    test_training.compare_copies(report, tmp_path / "trace.json.gz", steps=3)
    assert [line.split("found ")[1].split(",")[0] for line in report.failed] == failed
    assert rows[-1]["value"] == 1  # copy to the host per step
