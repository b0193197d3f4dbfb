"""Two machines, as two torchrun agents on this one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import worker
from tests.faults.runs import NO_DROPOUT, Run, children_of, launch_environment
from tests.processes import WAIT_S, free_port

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.multiprocess


class TwoNodes:
    """`scripts_bash/rear_train_multinode.sh` twice; a start of its own port and output."""

    def __init__(self, run: Run) -> None:
        self.run, self.starts = run, 0

    def start(self, *overrides: str, **variables: str) -> list[subprocess.Popen]:
        self.starts += 1
        python = Path(sys.executable).parent  # the environment's torchrun
        common = {"NUM_NODES": "2", "GPUS_PER_NODE": "1", "MASTER_PORT": str(free_port()), "TIMEOUT": "60"}
        common |= {"CONFIG": self.run.arguments[0].removeprefix("config="), "OUTPUT_DIR": str(self.run.folder)}
        nodes = []
        for rank in range(2):
            environment = launch_environment(NODE_RANK=str(rank), PATH=f"{python}:{os.environ['PATH']}")
            with Path(self.output(rank)).open("w") as output:
                nodes.append(
                    subprocess.Popen(
                        ["bash", "scripts_bash/rear_train_multinode.sh", *self.run.arguments[1:-1], *overrides],
                        env=environment | common | variables,
                        cwd=ROOT,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
        return nodes

    def output(self, rank: int) -> str:
        return f"{self.run.folder}.node{self.starts}.{rank}"

    def text(self) -> str:
        return "".join(Path(self.output(rank)).read_text() for rank in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["agent", "node"])
def test_losing_an_agent_or_a_node_ends_the_other_and_both_continue(pair: Run, plain_oracle: Run, lost: str) -> None:
    nodes = TwoNodes(pair)
    agents = nodes.start(*NO_DROPOUT, "training.max_train_steps=3000", "experiment.save_every=20")
    workers = []
    try:
        pair.wait_for_step(25)
        workers = children_of(agents[1].pid)
        assert len(workers) == 1
        if lost == "node":
            os.killpg(agents[1].pid, signal.SIGKILL)
            os.kill(workers[0], signal.SIGKILL)  # torchrun starts workers in sessions of their own
        else:
            agents[1].kill()
        assert agents[0].wait(WAIT_S) != 0
    finally:
        for agent in agents:
            agent.kill()
    status = pair.status()
    if lost == "node":
        assert status.status == "failed"
        assert "another rank is gone or did not answer within training.process_group_timeout=20 s" in nodes.text()
    else:
        assert (status.status, status.reason) == ("preempted", "a signal to another rank")
        assert f"preempted at step {status.step}" in nodes.text()
        assert pair.checkpoints()[-1] == f"checkpoint-{status.step}"
    last = int(pair.checkpoints()[-1].removeprefix("checkpoint-"))
    agents = nodes.start(*NO_DROPOUT, "training.max_train_steps=3000", f"training.stop_steps={last + 3}")
    assert [agent.wait(WAIT_S) for agent in agents] == [0, 0], nodes.text()
    assert pair.status().status == "completed"
    assert f"steps {last} to {last + 3}" in pair.log()
    assert [row[0] for row in pair.curves()] == [*range(1, last + 4)]


@pytest.mark.slow
def test_after_a_killed_worker_restarted_agents_meet_again(pair: Run, tmp_path: Path) -> None:
    """One agent counts a restart of its own, the other one follows: TORCHELASTIC_RESTART_COUNT differs."""
    overrides = [*NO_DROPOUT, "training.max_train_steps=60", "experiment.save_every=10"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max_restarts=2"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    command += ["--monitor_interval=1", worker.__file__, *pair.arguments, *overrides]
    agents = []
    try:
        for rank in range(2):
            with (tmp_path / f"agent{rank}").open("w") as output:
                environment = launch_environment(TEST_SLOW="0.2")
                agents.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        pair.wait_for_step(15)
        os.kill(children_of(agents[1].pid)[0], signal.SIGKILL)
        codes = [agent.wait(2 * WAIT_S) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert codes == [0, 0], "".join((tmp_path / f"agent{rank}").read_text() for rank in range(2))
    assert pair.status().status == "completed"
    assert pair.log().count(" processes, steps ") == 2
    assert [row[0] for row in pair.curves()] == [*range(1, 61)]


def test_two_nodes_train_as_one_process_does(pair: Run, plain_oracle: Run) -> None:
    nodes = TwoNodes(pair)
    agents = nodes.start(*NO_DROPOUT)
    assert [agent.wait(WAIT_S) for agent in agents] == [0, 0], nodes.text()
    for ours, theirs in zip(pair.curves(), plain_oracle.curves(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-5)
