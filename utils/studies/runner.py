"""Running the cells of a study side by side, each stage as a process of its own.

Any number of these commands, on machines with the same file system, share the cells: the command that holds the
lock in the folder of a cell runs it. Not submitit, joblib or luigi: here the scripts themselves resume, locks share out
the work, and SLURM needs only a job array of the same command (scripts_bash/slurm_study.sbatch).
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from statistics import mean
from typing import IO

from tqdm import tqdm

from utils.errors import InputError
from utils.files.lock import is_in_use, only_writer
from utils.processes import num_cpus
from utils.run.signals import PR_SET_PDEATHSIG, STOP_SIGNALS, StopSignals
from utils.run.status import EXIT_PREEMPTED, read_status_or_none
from utils.studies.cells import Cell, State, cells_of
from utils.studies.plan import Plan, Stage

POLL_S = 0.1
REFRESH_S, REFRESH_LOG_S = 2, 300  # of the progress bar in a terminal, and in a file
ERROR_CHARACTERS = 300
LIBC = ctypes.CDLL(None)
ENDED_BY_A_STOP = (EXIT_PREEMPTED, *(-number for number in STOP_SIGNALS))  # a batch system may signal all processes


@dataclass
class Running:
    """A stage in progress.

    Attributes:
        log_start: byte of the log at which the output of this attempt begins.
        started: time.monotonic().
        lock: lock of the cell, held until this command leaves it.
    """

    cell: Cell
    state: State
    stage: Stage
    process: subprocess.Popen
    log: IO[bytes]
    log_start: int
    started: float
    gpu: str | None
    lock: ExitStack

    @property
    def elapsed(self) -> float:
        return self.state.spent + time.monotonic() - self.started


@dataclass
class RunOutcome:
    """Names of cells that this command ended with an error, or left because of a signal."""

    failed: list[str] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        return EXIT_PREEMPTED if self.interrupted else 1 if self.failed else 0


class Runner:
    """
    Args:
        plan_sha256: stored with each cell.
        workers: cells side by side.
        gpus: ids of the GPUs, which the cells share; empty: they run on the CPU.
    """

    def __init__(self, plan: Plan, plan_sha256: str, workers: int, gpus: Sequence[str]) -> None:
        self.plan = plan
        self.plan_sha256 = plan_sha256
        self.workers = workers
        self.gpus = gpus
        self.cells = cells_of(plan)
        states = {cell: cell.read() for cell in self.cells}
        self.waiting = [cell for cell, state in states.items() if state.condition != "complete"]
        self.failed_before = {cell for cell, state in states.items() if state.condition == "failed"}
        self.running: list[Running] = []
        self.stopping = False
        self.outcome = RunOutcome()

    def run(self) -> RunOutcome:
        """Run all cells that are not complete and not run by another command. A stop signal ends the stages in
        progress, and training saves; a second Ctrl-C kills them."""
        total = len(self.cells) * len(self.plan.file.stages)
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} stages [{elapsed}{postfix}]"
        refreshed, refresh_s = 0.0, REFRESH_S if sys.stderr.isatty() else REFRESH_LOG_S
        with StopSignals() as signals, tqdm(total=total, desc=self.plan.name, bar_format=layout) as bar:
            try:
                self._start_cells()
                while self.running:
                    if signals.requested() and not self.stopping:
                        self._stop(signals.received)
                    ended = [one for one in self.running if one.process.poll() is not None]
                    for one in ended:
                        self._end_stage(one)
                    if ended:
                        self._start_cells()
                    if ended or time.monotonic() > refreshed + refresh_s:
                        self._show(bar)
                        refreshed = time.monotonic()
                    time.sleep(POLL_S)
            finally:
                for one in self.running:
                    one.process.kill()
                    one.process.wait()
                    one.lock.close()
        if self.stopping:
            self.outcome.interrupted += [cell.name for cell in self.waiting]
        return self.outcome

    def _start_cells(self) -> None:
        for cell in list(self.waiting):
            if self.stopping or len(self.running) == self.workers:
                return
            if is_in_use(cell.folder):
                continue
            lock = ExitStack()
            try:
                lock.enter_context(only_writer(cell.folder, inside=True))
            except InputError:  # another command was faster
                continue
            self.waiting.remove(cell)
            state = cell.read()
            done_by_another = state.condition == "complete" or (
                state.condition == "failed" and cell not in self.failed_before
            )
            if done_by_another:
                lock.close()
                continue
            self._continue(cell, state, lock, self._free_gpu())

    def _continue(self, cell: Cell, state: State, lock: ExitStack, gpu: str | None) -> None:
        """Start the next stage of a cell, or complete it."""
        stage = cell.next_stage(state)
        if stage is None:
            try:
                state.metrics = cell.metrics()
                state.weights = cell.weights()
            except InputError as error:
                self._fail(cell, state, str(error))
            cell.write(state)
            lock.close()
            return
        state.error = ""
        state.plan_sha256 = state.plan_sha256 or self.plan_sha256
        cell.write(state)
        command = cell.command(stage)
        log_path = cell.folder / f"{stage}.log"
        log = log_path.open("ab")
        log.write(f"\n{datetime.now(timezone.utc).isoformat(timespec='seconds')} {shlex.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(gpu),
            start_new_session=True,  # a Ctrl-C goes to this process only, which ends the stages
            preexec_fn=_die_with_parent,
        )
        self.running.append(
            Running(
                cell=cell,
                state=state,
                stage=stage,
                process=process,
                log=log,
                log_start=log.tell(),
                started=time.monotonic(),
                gpu=gpu,
                lock=lock,
            )
        )

    def _end_stage(self, ended: Running) -> None:
        """Record a stage whose process has ended, and start the next one."""
        self.running.remove(ended)
        ended.log.close()
        cell, state, status = ended.cell, ended.state, ended.process.returncode
        if status == 0:
            state.seconds[ended.stage] = ended.elapsed
            state.spent = 0.0
            if not self.stopping or cell.next_stage(state) is None:
                self._continue(cell, state, ended.lock, ended.gpu)
                return
        else:
            state.spent = ended.elapsed
        if self.stopping or status in ENDED_BY_A_STOP:
            self.outcome.interrupted.append(cell.name)
        elif status != 0:
            self._fail(cell, state, f"{ended.stage}: {_reason(ended)}")
        cell.write(state)
        ended.lock.close()

    def _fail(self, cell: Cell, state: State, error: str) -> None:
        state.error = error
        self.outcome.failed.append(cell.name)
        tqdm.write(f"{cell.name} failed: {error}")

    def _stop(self, reason: str | None) -> None:
        self.stopping = True
        tqdm.write(f"{reason}: ending {', '.join(one.cell.name for one in self.running)}; rerun the command to resume")
        for one in self.running:
            one.process.terminate()

    def _free_gpu(self) -> str | None:
        """The GPU that the fewest running cells use."""
        used = [one.gpu for one in self.running]
        return min(self.gpus, key=used.count, default=None)

    def _show(self, bar: tqdm) -> None:
        states = [cell.read() for cell in self.cells]
        bar.n = sum(len(state.seconds) for state in states)
        failed = sum(state.condition == "failed" for state in states)
        remaining, is_bound = remaining_s(self.plan.file.stages, states, self.running, self.workers)
        eta = f"ETA {'at least ' if is_bound else ''}{timedelta(seconds=round(remaining))}"
        if is_bound and remaining == 0:
            eta = "ETA unknown"
        bar.set_postfix_str(f"{len(self.running)} running, {failed} failed, {eta}", refresh=True)


def remaining_s(
    stages: Sequence[Stage], states: Sequence[State], running: Sequence[Running], workers: int
) -> tuple[float, bool]:
    """Seconds until all cells are complete, by the mean duration of each stage so far, and whether that is only a lower
    bound, because the duration of some stage is unknown. The duration of the first training is its own estimate."""
    durations = {stage: [state.seconds[stage] for state in states if stage in state.seconds] for stage in stages}
    if "train" in durations and not durations["train"]:
        statuses = [read_status_or_none(one.cell.folder / "run") for one in running if one.stage == "train"]
        durations["train"] = [
            status.trained_s + status.eta_s for status in statuses if status is not None and status.eta_s is not None
        ]
    missing = [stage for state in states for stage in stages if stage not in state.seconds]
    expected = {stage: mean(known) for stage, known in durations.items() if known}
    total = sum(expected.get(stage, 0.0) for stage in missing)
    total -= sum(min(one.elapsed, expected.get(one.stage, 0.0)) for one in running)
    unfinished = sum(len(state.seconds) < len(stages) for state in states)
    return total / max(1, min(workers, unfinished)), any(stage not in expected for stage in missing)


def default_gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    import torch  # slow

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = [str(index) for index in range(torch.cuda.device_count())]
    return ids if given is None else given.split(",")[: len(ids)]


def default_workers(gpus: Sequence[str]) -> int:
    """One cell for each GPU; without GPUs, one for each CPU."""
    return len(gpus) or num_cpus()


def _environment(gpu: str | None) -> dict[str, str]:
    """Environment of a stage: one thread, since the number of threads changes rounding."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **threads, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}


def _die_with_parent() -> None:
    """In a child before its program starts: let the kernel kill it when the study is killed. Otherwise it would run on,
    and a new study would find its folder in use."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _reason(ended: Running) -> str:
    """Why a command failed: the signal, or the last line of its output."""
    log = Path(ended.log.name)
    if ended.process.returncode < 0:
        name = signal.Signals(-ended.process.returncode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}; see {log}"
    with log.open("rb") as file:
        file.seek(ended.log_start)
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"{last.removeprefix('error: ')[:ERROR_CHARACTERS]}; see {log}"


def conditions(cells: Iterable[Cell]) -> dict[Cell, tuple[State, str]]:
    """Each cell's state, and in a word: complete, failed, running, interrupted or waiting."""
    found = {}
    for cell in cells:
        state = cell.read()
        condition: str = state.condition
        if condition == "unfinished":
            started = (cell.folder / "cell.json").exists()
            condition = "running" if is_in_use(cell.folder) else "interrupted" if started else "waiting"
        found[cell] = (state, condition)
    return found
