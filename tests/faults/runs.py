"""Start training runs that may die, and compare their results."""

import json
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.faults import worker
from tests.processes import SERVER, STARTED, WAIT_S, rank_environments
from utils.run.checkpoint import checkpoint_folders
from utils.run.metrics_file import read_metrics
from utils.run.status import Status, read_status

CURVES = ["train/loss", "train/ar_loss", "train/proj_loss", "train/correct_tokens", "train/grad_norm", "train/lr"]
NO_DROPOUT = ["model.generator.dropout=0", "model.generator.attn_drop=0"]


class Run:
    """A training run in `folder`; next to it are the sample ids of every start and the output of the last one."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.arguments = [*arguments, f"experiment.output_dir={folder}"]
        self.folder, self.records = folder, []
        self.processes: list[BaseProcess] = []

    def start(self, *overrides: str, processes: int = 1, per_rank: dict[int, list[str]] | None = None, **env: str):
        """Start all ranks; `per_rank` has further arguments of some."""
        common = {"TEST_RECORD": str(self.new_record()), **env}
        self.processes = []
        for rank, address in enumerate(rank_environments(processes) if processes > 1 else [{}]):
            arguments = [*self.arguments, *overrides, *(per_rank or {}).get(rank, [])]
            output = f"{self.folder}.out{rank}"
            Path(output).write_text("")
            process = SERVER.Process(target=worker.train_in_child, args=(arguments, common | address, output))
            process.start()
            self.processes.append(process)
            STARTED.append(process)
        return self

    def new_record(self) -> Path:
        """A file for the sample ids of one more start."""
        self.records.append(Path(f"{self.folder}.ids{len(self.records)}"))
        return self.records[-1]

    def wait(self) -> list[int]:
        """Exit codes of all ranks; -9 for one that was killed. Ends those that hang."""
        deadline = time.monotonic() + WAIT_S
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        assert not hanging, f"{self.folder} hangs:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def __call__(self, *overrides: str, **options) -> list[int]:
        return self.start(*overrides, **options).wait()

    def completed(self, *overrides: str, **options) -> "Run":
        codes = self(*overrides, **options)
        assert set(codes) == {0}, self.output()
        assert self.status().status == "completed"
        return self

    def wait_for_step(self, step: int) -> None:
        """Until the metrics of that step are written."""
        deadline = time.monotonic() + WAIT_S
        metrics = self.folder / "metrics.jsonl"
        while not metrics.is_file() or all(row["step"] < step for row in read_metrics(metrics)):
            assert time.monotonic() < deadline, self.output()
            assert not self.processes or any(process.is_alive() for process in self.processes), self.output()
            time.sleep(0.02)

    def output(self, rank: int | None = None) -> str:
        ranks = range(len(self.processes)) if rank is None else [rank]
        return "".join(Path(f"{self.folder}.out{rank}").read_text() for rank in ranks)

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def status(self) -> Status:
        return read_status(self.folder)

    def checkpoints(self) -> list[str]:
        return [path.name for path in checkpoint_folders(self.folder)]

    def ids(self) -> dict[int, list[int]]:
        """Dataset rows by step, ranks one after another; of a step that was run twice the last time counts."""
        by_step: dict[int, list[int]] = {}
        for record in self.records:
            of_ranks: dict[int, dict[int, list[int]]] = {}
            for line in map(json.loads, record.read_text().splitlines() if record.is_file() else []):
                of_ranks.setdefault(line["step"], {}).setdefault(line["rank"], []).extend(line["ids"])
            for step, by_rank in of_ranks.items():
                by_step[step] = [row for rank in sorted(by_rank) for row in by_rank[rank]]
        return by_step

    def dropout_seeds(self) -> dict[int, list[int]]:
        """Of all micro-batches by step, in the last start."""
        by_step: dict[int, list[int]] = {}
        for line in map(json.loads, self.records[-1].read_text().splitlines()):
            by_step.setdefault(line["step"], []).append(line["dropout"])
        return by_step

    def curves(self) -> list[list[float]]:
        return [[row["step"], *(row[name] for name in CURVES)] for row in read_metrics(self.folder / "metrics.jsonl")]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Final weights and optimizer state by name."""
        newest = checkpoint_folders(self.folder)[-1]
        tensors = {f"final {key}": value for key, value in load_file(self.folder / "model.safetensors").items()}
        tensors |= load_file(newest / "model.safetensors")
        for path in newest.glob("*.bin"):
            for name, state in torch.load(path, weights_only=True)["state"].items():
                tensors |= {f"{name} {key}": value for key, value in state.items()}
        return tensors


def assert_equal_runs(run: Run, oracle: Run) -> None:
    """Bit for bit: losses and rates per step, sample ids, final weights, optimizer state."""
    assert run.curves() == oracle.curves()
    assert run.ids() == oracle.ids()
    ours, theirs = run.tensors(), oracle.tensors()
    assert ours.keys() == theirs.keys()
    differing = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert differing == []


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def launch_environment(**variables: str) -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **variables}
