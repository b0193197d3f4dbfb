"""Scores in the metrics of the run whose weights were sampled, at the step of these weights."""

from pathlib import Path

from utils.errors import InputError
from utils.files.json_file import read_json
from utils.run.metrics_file import METRICS_FILE, MetricsFile, read_metrics


def find_step(samples: Path, run: Path) -> int:
    """After how many steps of `run` the weights behind `samples` were saved, as the sampler has recorded beside them.

    Raises:
        InputError: `run` is no run folder, the record is missing or does not tell the step, or it tells of another file
            or of the weights of another run.
    """
    if not (run / METRICS_FILE).is_file():
        raise InputError(f"--log-to {run}: found no {METRICS_FILE}, expected the folder of a training run")
    record = samples.with_suffix(".json")
    if not record.is_file():
        raise InputError(f"{record}: missing; --log-to needs the record of the sampler, which tells the step")
    found = read_json(record)
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise InputError(
            f"{record}: does not tell 'step', that of the weights; sample from a run folder or a checkpoint, which "
            "tell it, into another output"
        )
    if found.get("bytes") != (size := samples.stat().st_size):
        raise InputError(f"{record}: tells of a file of {found.get('bytes')} bytes, found {size} in {samples}")
    run_of_weights = next((p for p in Path(found.get("weights", "")).parents if (p / METRICS_FILE).is_file()), run)
    if not run_of_weights.samefile(run):
        raise InputError(f"--log-to {run}: the weights of {samples} are of another run, {run_of_weights}")
    return found["step"]


def log_scores(run: Path, step: int, scores: dict[str, float]) -> None:
    """Append `eval/<name>` to the run's metrics unless these values are there; a training that goes on may append too.

    Raises:
        InputError: the metrics cannot be read.
        OSError: they cannot be written.
    """
    path, values = run / METRICS_FILE, {f"eval/{name}": value for name, value in scores.items()}
    if any(row["step"] == step and values.items() <= row.items() for row in read_metrics(path)):
        return
    metrics = MetricsFile(path)
    metrics.append(step, values)
    metrics.flush()
